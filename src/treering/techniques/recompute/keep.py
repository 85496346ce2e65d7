"""What is kept beside a block's input, by torch's selective checkpoint: results of operators that policies name."""

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from treering.core.errors import PlanError

IN_PLACE = ("alltoall_base_", "alltoall_")  # of c10d: they fill a tensor that they are given


class Policy:
    """Which results of one pass through a block are kept, and whether there was any."""

    def __init__(self, keep: tuple[str, ...]):
        self.keep = keep
        self.seen: Counter[str] = Counter()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = kind_of(op)
        if kind == "in place" and "all_to_all" in self.keep:
            raise PlanError(
                f"recompute: keep names all_to_all, and {op} fills a tensor that it is given, whose value cannot be "
                "kept; leave all_to_all out of recompute.keep",
                settings=("recompute.keep",),
            )
        if kind not in self.keep:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.seen[kind] += 1
        return CheckpointPolicy.MUST_SAVE

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For the first pass and for the second."""
        return create_selective_checkpoint_contexts(self)

    def refuse_unless_seen(self, block: str, attention: bool) -> None:
        """An option that quietly does nothing would cost the time that it was meant to save."""
        if "attention" in self.keep and attention and not self.seen["attention"]:
            raise PlanError(
                f"recompute: keep names attention, and the attention of {block} ran as many small operators instead "
                "of one kernel whose result could be kept (softcap, sinks, packed windows and unequal head widths do "
                "so on a CPU); leave attention out of recompute.keep",
                settings=("recompute.keep",),
            )


def kind_of(op: Any) -> str:
    """`attention`, `all_to_all`, `in place` or nothing, by the operator's name: kernels are many and grow in number."""
    space, _, name = str(op.name()).rpartition("::")
    name = name.partition(".")[0]
    if "backward" in name:
        return ""
    if "attention" in name or "attn" in name:
        return "attention"
    if space == "c10d" and name in IN_PLACE:
        return "in place"
    return "all_to_all" if "all_to_all" in name else ""
