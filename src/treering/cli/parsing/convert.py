"""From a document to a checked dataclass, or to an error with all its problems; and the JSON schema of the rules."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from treering.cli.parsing.expand import expand
from treering.cli.parsing.explanations import explain
from treering.cli.parsing.overrides import override
from treering.cli.parsing.problems import ConfigErrors, in_order
from treering.cli.parsing.reader import ConfigDocument
from treering.cli.parsing.resolved import plain_values
from treering.cli.parsing.sections import keys, members, null_is_defaults, shorthand

T = TypeVar("T")
logger = logging.getLogger("treering")


def validate(
    cls: type[T],
    document: ConfigDocument,
    settings: Sequence[str] = (),
    notice: Callable[[str], None] = logger.warning,
) -> T:
    """Return `document` as an instance of the dataclass `cls`, or raise `ConfigErrors` with every problem.

    Args:
        cls: a frozen dataclass; its fields and the `ConfigError`s of its `__post_init__` are the rules
        document: the values of the file, with their lines
        settings: `path=value` each, applied to the document in order
        notice: is called with one line for each former name of a setting that was read
    """
    document = override(cls, expand(cls, document), settings)
    for line in document.notices:
        notice(line)
    config, errors = _check(cls, document, "forbid")
    if any(error["type"] == "unexpected_keyword_argument" for error in errors):
        # A section with an unknown key was not constructed: its `__post_init__` has to be called, too.
        errors += _check(cls, document, "ignore")[1]
    if errors or document.problems:
        problems = [*document.problems, *explain(cls, document, errors)]
        raise ConfigErrors(document.name, in_order(problems, document.places))
    return config  # type: ignore[no-any-return]


def _check(cls: type, document: ConfigDocument, unknown_keys: Literal["forbid", "ignore"]) -> tuple[Any, list[Any]]:
    try:
        # As JSON: strict validation takes an array for a tuple, and would refuse a Python list.
        return _adapter(cls).validate_json(json.dumps(document.values), strict=True, extra=unknown_keys), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON schema of `cls`, for editors that complete and check YAML."""
    schema = _adapter(cls).json_schema(schema_generator=_Schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _Schema(GenerateJsonSchema):
    """Adds to pydantic's schema the rules that `validate` adds: unknown keys, plain text, null, defaults."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        result = super().dataclass_schema(schema)
        result["additionalProperties"] = False
        for key in keys(schema["cls"]).values():
            inner = result["properties"][key.name]
            others = [{"type": "string"}] if shorthand(key.annotation) else []
            if null_is_defaults(key) and type(None) not in members(key.annotation):
                others.append({"type": "null"})
            if others:
                inner = result["properties"][key.name] = {"anyOf": [inner, *others]}
            if not key.required:
                inner["default"] = plain_values(key.default)
        return result
