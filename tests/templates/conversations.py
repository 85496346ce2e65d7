"""Random conversations, each text of them with a mark that tells afterwards whose it was."""

import json
import random
from typing import Any

WORDS = (
    "a", "Z9", " ", "\n", "\n\n", "\t", "é", "😀", "語", "<", "|", "<|", "</", "[", "im_end", "###", "Answer:", "{{",
    "{%", "'", '"', "\\", "\u200b", "\u00a0", "```json\n", "null", "assistant", "user\n", "&lt;", "e\u0301", "  ",
    "end of turn",
)  # fmt: skip
THINK = ("<think>", "</think>", "<think>\n\n</think>\n\n", "<tool_response>", "</tool_response>", "<tool_call>")


class Maker:
    """Conversations of one seed. `control` are strings that must stay text wherever they are."""

    def __init__(self, seed: int, control: tuple[str, ...] = ()):
        self.draw = random.Random(seed)
        self.control = control
        self.marks: dict[str, tuple[int, str]] = {}  # mark -> (message, what it is in)

    def text(self, turn: int, what: str, *, harmful: bool, tags: bool = False) -> str:
        """A text with a mark at either end."""
        count = self.draw.randint(0, 5)
        words = [self.draw.choice(WORDS) for _ in range(count)]
        if harmful and self.control:
            words.insert(self.draw.randint(0, count), self.draw.choice(self.control))
        if tags:
            words.insert(self.draw.randint(0, len(words)), self.draw.choice(THINK))
        first, last = self._mark(turn, what), self._mark(turn, what)
        blank = self.draw.choice(("", "", "", " ", "\n"))
        return f"{blank}{first}{''.join(words)}{last}{self.draw.choice(('', '', ' ', chr(10)))}"

    def _mark(self, turn: int, what: str) -> str:
        mark = f"k{len(self.marks)}q"
        self.marks[mark] = (turn, what)
        return mark

    def conversation(self) -> tuple[list[dict[str, Any]], list[Any] | None]:
        draw = self.draw
        harmful, tags = draw.random() < 0.4, draw.random() < 0.15
        messages: list[dict[str, Any]] = []
        tools = [self.tool()] if draw.random() < 0.4 else None

        def add(role: str, **more: Any) -> None:
            content = self.text(len(messages), "content", harmful=harmful and draw.random() < 0.5, tags=tags)
            messages.append({"role": role, "content": content, **more})

        if draw.random() < 0.4:
            add("system")
        for _ in range(draw.randint(1, 3)):
            add("user")
            if tools and draw.random() < 0.6:
                self._calls(messages, harmful)
            add("assistant")
            if draw.random() < 0.05:
                add("assistant")
            if draw.random() < 0.2:
                self._think(messages[-1], len(messages) - 1, harmful)
        return messages, tools

    def _calls(self, messages: list[dict[str, Any]], harmful: bool) -> None:
        draw = self.draw
        turn = len(messages)
        count = draw.choice((1, 1, 1, 2))
        calls = [
            {
                "id": f"call{turn}{i}abc",
                "type": "function",
                "function": {"name": "add_up", "arguments": self._arguments(turn, harmful)},
            }
            for i in range(count)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": draw.choice(("", "", None)), "tool_calls": calls}
        if draw.random() < 0.2:
            message["content"] = self.text(turn, "content", harmful=harmful)
        if draw.random() < 0.2:
            message["reasoning_content"] = self.text(turn, "thought", harmful=harmful)
        messages.append(message)
        for call in calls:
            content = self.text(len(messages), "content", harmful=harmful)
            messages.append({"role": "tool", "content": content, "name": "add_up", "tool_call_id": call["id"]})

    def _arguments(self, turn: int, harmful: bool) -> Any:
        draw = self.draw
        if draw.random() < 0.1:
            return draw.choice(({}, "{}", ""))
        value: dict[str, Any] = {"a": draw.choice((1, -2.5, True, None, [1, 2], {"deep": [3]}))}
        for name in ("text", "other")[: draw.randint(0, 2)]:
            value[name] = self.text(turn, "arguments", harmful=harmful)
        return json.dumps(value, ensure_ascii=draw.random() < 0.5) if draw.random() < 0.5 else value

    def _think(self, message: dict[str, Any], turn: int, harmful: bool) -> None:
        thought = self.text(turn, "thought", harmful=harmful)
        if self.draw.random() < 0.5:
            message[self.draw.choice(("reasoning_content", "thinking", "reasoning"))] = thought
        else:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"

    def tool(self) -> dict[str, Any]:
        draw = self.draw
        about = (
            f"Adds. {draw.choice(WORDS)} {draw.choice(self.control) if self.control and draw.random() < 0.2 else ''}"
        )
        fields = {"a": {"type": "number", "description": "first"}, "text": {"type": "string", "description": about}}
        parameters = {"type": "object", "properties": fields, "required": ["a"]}
        return {"type": "function", "function": {"name": "add_up", "description": about, "parameters": parameters}}
