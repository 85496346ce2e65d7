"""From written values to a checked configuration, or to everything that is wrong with it."""

import copy
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from treering.cli.parsing.explain import explain
from treering.cli.parsing.normal import normal
from treering.cli.parsing.overrides import override
from treering.cli.parsing.problems import ConfigErrors
from treering.cli.parsing.reader import Document

T = TypeVar("T")


def validate(cls: type[T], document: Document, settings: Sequence[str] = ()) -> T:
    """`document`, with each `path=value` of `settings`, as a `cls`; or ConfigErrors with every problem."""
    if settings:
        document = override(document, cls, settings)
    values = normal(cls, document.values)
    result, errors = _check(cls, values)
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    if unknown:
        # A section with an unknown key is not made, so what its `__post_init__` would say is still hidden.
        _, others = _check(cls, _without(values, [e["loc"] for e in unknown]))
        errors = [*unknown, *others]
    if errors:
        raise ConfigErrors(document.name, explain(cls, document, values, errors))
    return result


def _check(cls: type, values: Any) -> tuple[Any, list[Any]]:
    from pydantic import ValidationError

    from treering.cli.parsing.adapter import adapter

    try:
        return adapter(cls).validate_json(json.dumps(values)), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


def _without(values: Any, locations: list[tuple[str | int, ...]]) -> Any:
    """`values` without the keys at `locations` (pydantic's, which may also name union arms)."""
    values = copy.deepcopy(values)
    for location in locations:
        place = values
        for step in location[:-1]:
            inside = isinstance(place, list) or (isinstance(place, dict) and step in place)
            place = place[step] if inside and not (isinstance(place, list) and isinstance(step, str)) else place
        place.pop(location[-1])
    return values


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON schema of `cls`, for editors that complete and check YAML."""
    from treering.cli.parsing.adapter import adapter

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **adapter(cls).json_schema(mode="validation")}
