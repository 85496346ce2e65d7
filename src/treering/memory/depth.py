"""Which blocks of a model repeat, and the same model with fewer of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LONGEST_PERIOD = 8


@dataclass(frozen=True, kw_only=True)
class RepeatedBlocks:
    """The blocks of a model: the first `prefix` of them, and then others that repeat every `period`."""

    depth: int
    prefix: int
    period: int

    def depths(self) -> tuple[int, ...]:
        """Return the numbers of blocks to trace: two that differ by two periods, or all blocks."""
        rest = (self.depth - self.prefix) % self.period
        small = self.prefix + rest + 3 * self.period
        large = small + 2 * self.period
        return (small, large) if large < self.depth else (self.depth,)

    def moments(self, depth: int) -> list[int]:
        """Return the segments of a trace of `depth` blocks that correspond to those of another depth, in time order."""
        first = list(range(self.prefix + 2 * self.period))
        last = list(range(depth - 2 * self.period, depth))
        forward = [1 + i for i in (*first, *last)]
        backward = [2 * depth + 1 - i for i in reversed((*first, *last))]
        return [0, *forward, depth + 1, *backward, 2 * depth + 2, 2 * depth + 3]


def repeats(kinds: list[Any]) -> RepeatedBlocks:
    """Return the shortest pattern in which blocks repeat. `kinds`: of each block, equal where blocks are."""
    depth = len(kinds)
    for period in range(1, LONGEST_PERIOD + 1):
        prefix = depth
        while prefix > period and kinds[prefix - 1] == kinds[prefix - 1 - period]:
            prefix -= 1
        prefix -= period
        if prefix + 6 * period <= depth:
            return RepeatedBlocks(depth=depth, prefix=max(prefix, 0), period=period)
    return RepeatedBlocks(depth=depth, prefix=0, period=depth)


def shorten(config: "PretrainedConfig", depth: int) -> None:
    """Shorten `config` in place to the first `depth` blocks, and every list with an entry per block with them."""
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == before:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
