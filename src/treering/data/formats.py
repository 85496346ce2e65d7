"""From a record of a file to a checked sample; every error names the field."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

from treering.core.errors import DataError
from treering.data.chat.messages import check_messages
from treering.data.config import FIELDS, Data, Format
from treering.data.sources.records import Record, SampleError, bad, check_strings, check_text

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


class Sample(NamedTuple):
    """A checked sample: `chat` has messages and tools, `completion` has prompt and text, `text` has text."""

    kind: Literal["chat", "completion", "text"]
    where: str
    file: int
    row: int
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    prompt: str = ""
    text: str = ""


def detect(records: list[Record], config: Data) -> Format:
    """Return `config.format`, or with `auto` the format of the first record whose fields are those of a format."""
    if config.format != "auto":
        return config.format
    for record in records:
        if isinstance(record.value, SampleError):
            continue
        for name in get_args(Format):
            if all(config.columns.get(field, field) in record.value for field in _NEEDED[name]):
                return name
    first = next((r for r in records if not isinstance(r.value, SampleError)), None)
    if first is None:
        raise DataError(str(records[0].value) if records else "the sources have no record")
    assert isinstance(first.value, dict)
    wanted = "; ".join(" and ".join(fields) for fields in _NEEDED.values())
    raise DataError(
        f"{first.where}: the format is not recognised: the record has the fields {_listed(first.value)}; "
        f"known formats have {wanted}. Rename fields with data.columns, e.g. columns: {{messages: conversations}}"
    )


def parse(record: Record, format: Format, config: Data) -> Sample:
    """Return the checked sample of a record, or raise SampleError."""
    if isinstance(record.value, SampleError):
        raise record.value
    value = _named(record, format, config)
    where = record.where
    place: dict[str, Any] = {"where": where, "file": record.file, "row": record.row}
    if format == "messages":
        tools = value.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
            raise bad(where, "schema", "must be a list of tool descriptions", at="tools")
        messages = check_messages(value["messages"], where, columnar=record.columnar)
        check_strings(tools, where, "tools")
        return Sample(kind="chat", messages=messages, tools=tools or None, **place)
    for field, entry in value.items():
        check_text(entry, where, field)
    if format == "text":
        _not_empty(value, "text", where)
        return Sample(kind="text", text=value["text"], **place)
    if format == "prompt":
        _not_empty(value, "completion", where)
        return Sample(kind="completion", prompt=value["prompt"], text=value["completion"], **place)
    _not_empty(value, "instruction", where)
    _not_empty(value, "output", where)
    question = "\n\n".join(part for part in (value["instruction"], value.get("input") or "") if part)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": value["output"]}]
    return Sample(kind="chat", messages=messages, **place)


def _named(record: Record, format: Format, config: Data) -> dict[str, Any]:
    """Return the fields of `format` under our names. Unknown fields are an error: they may be typing errors."""
    assert isinstance(record.value, dict)
    rest = dict(record.value)
    value: dict[str, Any] = {}
    for field in FIELDS[format]:
        column = config.columns.get(field, field)
        if column not in rest:
            if field in _NEEDED[format]:
                raise bad(record.where, "schema", f"is missing; the record has {_listed(record.value)}", at=column)
            continue
        entry = rest.pop(column)
        if entry is None:
            if field in _NEEDED[format] or not record.columnar:
                raise bad(record.where, "schema", "is null", at=column)
            continue  # in columnar files an absent field is null
        value[field] = entry
    unknown = [name for name in rest if not any(fnmatchcase(str(name), pattern) for pattern in config.ignore)]
    if unknown:
        raise bad(
            record.where,
            "schema",
            f"is not a field of the format {format!r} (it has {', '.join(FIELDS[format])}); "
            "list it in data.ignore, or rename it with data.columns",
            at=str(unknown[0])[:80],
        )
    return value


def _not_empty(value: dict[str, Any], field: str, where: str) -> None:
    if not value[field].strip():
        raise bad(where, "empty", "is empty", at=field)


def _listed(value: dict[str, Any]) -> str:
    names = sorted(map(str, value))
    return ", ".join(name[:40] for name in names[:12]) + (" …" if len(names) > 12 else "") if names else "no fields"
