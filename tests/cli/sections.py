"""What tests of parsing share: the smallest configuration, and a section with every shape a section may have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from treering.cli.parsing import ConfigErrors, Problem, read_text, validate
from treering.cli.schema import RunConfig
from treering.core.errors import ConfigError

SMALL = "model: gpt2\ndata: chat.jsonl\noutput: runs/x\n"


def config(text: str, *settings: str) -> RunConfig:
    return validate(RunConfig, read_text(SMALL + text, name="run.yaml"), settings)


def problems(text: str, *settings: str, cls: type = RunConfig, start: str = SMALL) -> list[Problem]:
    with pytest.raises(ConfigErrors) as caught:
        validate(cls, read_text(start + text, name="run.yaml"), settings)
    return list(caught.value.problems)


def only(text: str, *settings: str) -> Problem:
    (problem,) = problems(text, *settings)
    return problem


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError("size is negative", field="size")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """All shapes that a section may have."""

    number: float | Literal["auto"] = "auto"
    pair: tuple[int, float] = (1, 2.0)
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    on: Inner | None = field(default_factory=Inner)
    off: Inner | None = None
    many: tuple[Inner, ...] = ()
    named: dict[str, Inner] = field(default_factory=dict)
    mixed: str | tuple[str, ...] | None = None
    flag: bool = False
    text: str = ""
