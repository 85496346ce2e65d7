"""Settings of the data: a frozen dataclass that checks its values and does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from treering.core.errors import ConfigError

Format = Literal["messages", "prompt", "alpaca", "text"]
FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "text": ("text",),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where examples come from and how they become tokens.

    A source is a .jsonl, .parquet or .txt file, a folder of them, a folder written by `datasets`, or a hub name.
    `columns` maps our field names to the file's (`messages: conversations`). `ignore` lists patterns of fields that
    are not read; any other unknown field is an error.
    """

    train: str | tuple[str, ...]
    eval: str | tuple[str, ...] | None = None
    eval_fraction: float = 0.0  # held out of `train` by content, so that duplicates are in the same set
    split: str = "train"  # of a `datasets` source
    eval_split: str = "validation"
    format: Literal["auto", "messages", "prompt", "alpaca", "text"] = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    template: str | None = None  # path of a Jinja chat template; default: the tokenizer's
    max_length: int = 4096
    too_long: Literal["truncate", "drop", "error"] = "truncate"  # plain text is cut into pieces instead of truncated
    packing: Literal["auto", "on", "off"] = "auto"
    shuffle: bool = True
    skip_bad: bool = False
    skip_untrained: bool = False
    line_limit: int = 32 * 2**20  # bytes of one jsonl line
    cache: str | None = "~/.cache/treering/tokens"  # None: a private temporary folder, deleted at the end
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            _check_sources(getattr(self, name), name)
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; a document needs at least 2 tokens", field="max_length"
            )
        for name in ("line_limit", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1", field=name)
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1", field="eval_fraction"
            )
        if self.eval is not None and self.eval_fraction > 0:
            raise ConfigError("eval and eval_fraction are both set; keep one of them", field="eval_fraction")
        known = {name for names in FIELDS.values() for name in names}
        for name in self.columns:
            if name not in known:
                raise ConfigError(
                    f"columns renames {name!r}, which no format has; known fields are {', '.join(sorted(known))}",
                    field=f"columns.{name}",
                )

    @property
    def evaluates(self) -> bool:
        """Whether there is an evaluation set."""
        return self.eval is not None or self.eval_fraction > 0

    def sources(self, which: Literal["train", "eval"]) -> tuple[str, ...]:
        """Return the sources of a set; a held-out fraction is read from `train`."""
        value = self.eval if which == "eval" and self.eval is not None else self.train
        return (value,) if isinstance(value, str) else value


def _check_sources(value: str | tuple[str, ...] | None, name: str) -> None:
    if value is None:
        return
    sources = (value,) if isinstance(value, str) else value
    if not sources or any(not source.strip() for source in sources):
        raise ConfigError(f"{name} is empty; give a file, a folder or a hub name", field=name)
