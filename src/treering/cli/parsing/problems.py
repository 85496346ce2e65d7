"""What is wrong with a configuration, said so that it can be put right without opening another page."""

from collections.abc import Sequence
from dataclasses import dataclass

from treering.cli.text import count, plain
from treering.core.errors import ConfigError

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """`("data", "sources", 0, "path")` as people write it: `data.sources[0].path`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return plain(text)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: where, what was given, what is allowed, what to do."""

    where: str  # "run.yaml:12", "--set train.steps"
    message: str
    path: Path = ()
    allowed: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {dotted(self.path)}" if self.path else self.where
        lines = [head, f"    {self.message}"]
        lines += [f"    allowed: {self.allowed}"] if self.allowed else []
        lines += [f"    → {self.remedy}"] if self.remedy else []
        return "\n".join(lines)


class ConfigErrors(ConfigError):
    """Everything that is wrong with a configuration."""

    def __init__(self, name: str, problems: Sequence[Problem]):
        assert problems
        self.problems = tuple(problems)
        shown = [str(p) for p in self.problems[:20]]
        if len(self.problems) > 20:
            shown.append(f"… and {len(self.problems) - 20} more")
        super().__init__("\n".join([f"{plain(name)}: {count(len(self.problems), 'problem')}", *shown]))
