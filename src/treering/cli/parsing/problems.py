"""The problems of a configuration, with what a user needs to correct them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from treering.cli.text import count, plain
from treering.core.errors import ConfigError

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """Return a path as text: `data.sources[0].path` for `("data", "sources", 0, "path")`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return plain(text)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: where, what was given, what is allowed, what to do."""

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
    """All problems of a configuration in one error."""

    def __init__(self, name: str, problems: Sequence[Problem]):
        assert problems
        self.problems = tuple(problems)
        lines = [str(p) for p in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"… and {len(self.problems) - 20} more")
        super().__init__("\n".join([f"{plain(name)}: {count(len(self.problems), 'problem')}", *lines]))


def in_order(problems: Iterable[Problem], places: Iterable[Path]) -> list[Problem]:
    """Return one problem for each path, in the order of the paths that were written."""
    first: dict[Path, Problem] = {}
    for problem in problems:
        first.setdefault(problem.path, problem)
    order = {path: i for i, path in enumerate(places)}

    def position(problem: Problem) -> int:
        ends = range(len(problem.path), -1, -1)
        return next((order[problem.path[:end]] for end in ends if problem.path[:end] in order), -1)

    return sorted(first.values(), key=position)
