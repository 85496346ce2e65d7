"""The schema of a conversation."""

from typing import Any

from treering.data.sources.jsonl import parse_line
from treering.data.sources.records import SampleError, bad, check_strings, check_text

ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS}


def check_messages(value: object, where: str, *, columnar: bool) -> list[dict[str, Any]]:
    """Return the messages, each with a role and, unless it only calls tools, a content string. Raise SampleError."""
    if not isinstance(value, list):
        raise bad(where, "schema", f"must be a list of messages, not {type(value).__name__}", at="messages")
    if not value:
        raise bad(where, "empty", "the conversation is empty", at="messages")
    messages = [_message(entry, where, f"messages[{i}]", columnar) for i, entry in enumerate(value)]
    _check_order(messages, where)
    return messages


def _message(value: object, where: str, at: str, columnar: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(where, "schema", f"must be an object with role and content, not {type(value).__name__}", at=at)
    # Clients and columnar files write unused fields as null.
    message = {
        k: v for k, v in value.items() if not (v is None and k != "content") and not (k == "tool_calls" and v == [])
    }
    if columnar:
        message = {k: v for k, v in message.items() if v is not None and v != []}
    if not message.keys() <= _KNOWN:
        unknown = next(key for key in message if key not in _KNOWN)
        raise bad(where, "schema", f"is not a field of a message ({', '.join(sorted(_KNOWN))})", at=f"{at}.{unknown}")
    if "role" not in message:
        raise bad(where, "schema", "is missing", at=f"{at}.role")
    role = message["role"]
    if role not in ROLES:
        shown = repr(role)[:40]
        raise bad(where, "role", f"is {shown}; allowed are {', '.join(ROLES)}", at=f"{at}.role")
    calls = message.get("tool_calls")
    if "tool_calls" in message:
        _check_calls(calls, role, where, f"{at}.tool_calls")
    if message.get("content") is None and calls:
        message.pop("content", None)
    elif "content" not in message:
        raise bad(where, "schema", "is missing", at=f"{at}.content")
    for field in message:
        if field not in ("role", "tool_calls"):
            if message[field] is None:
                raise bad(where, "schema", "is null", at=f"{at}.{field}")
            check_text(message[field], where, f"{at}.{field}")
    thoughts = [field for field in THOUGHTS if field in message]
    if thoughts and role != "assistant":
        raise bad(where, "schema", f"belongs to an assistant message, not to {role}", at=f"{at}.{thoughts[0]}")
    if role == "assistant" and not calls and not thoughts and not message["content"].strip():
        raise bad(where, "empty", "the assistant says nothing", at=f"{at}.content")
    return message


def _check_calls(calls: object, role: str, where: str, at: str) -> None:
    if role != "assistant":
        raise bad(where, "schema", f"belongs to an assistant message, not to {role}", at=at)
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise bad(where, "schema", "must be a list of at least one call", at=at)
    check_strings(calls, where, at)
    for i, call in enumerate(calls):
        nested = isinstance(call.get("function"), dict)
        place = f"{at}[{i}].function" if nested else f"{at}[{i}]"
        _check_call(call["function"] if nested else call, where, place)


def _check_call(call: dict[str, Any], where: str, at: str) -> None:
    """Check the name of a call, and its arguments: an object or, as OpenAI's clients write it, the JSON of one."""
    if not isinstance(call.get("name"), str) or not call["name"].strip():
        raise bad(where, "schema", "must be the name of a tool", at=f"{at}.name")
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        parsed = parse_line(arguments.encode(), where)
        if isinstance(parsed, SampleError):
            reason = str(parsed).removeprefix(f"{where}: ").split(";")[0].replace("the line contains", "it contains")
            raise bad(where, "schema", f"is a string that is not a JSON object: {reason}", at=f"{at}.arguments")
        check_strings(parsed, where, f"{at}.arguments")
    elif arguments is not None and not isinstance(arguments, str | dict):
        raise bad(where, "schema", "must be an object, or a string of the JSON of one", at=f"{at}.arguments")


def _check_order(messages: list[dict[str, Any]], where: str) -> None:
    after_user = False
    for i, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and after_user:
            raise _order(where, i, f"{role} comes after the first user turn; put it first")
        if role == "assistant" and not after_user:
            raise _order(where, i, "the assistant speaks before any user")
        if role == "tool" and (i == 0 or messages[i - 1]["role"] not in ("assistant", "tool")):
            raise _order(where, i, "a tool answers without an assistant turn before it")
        after_user = after_user or role == "user"
    if not any(message["role"] == "assistant" for message in messages):
        raise bad(where, "untrained", "no assistant turn, so there is nothing to train on", at="messages")


def _order(where: str, i: int, message: str) -> SampleError:
    return bad(where, "role order", message, at=f"messages[{i}].role")
