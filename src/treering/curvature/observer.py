"""Sums of a aᵀ over the tokens of every forward, one for each observed weight."""

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treering.core.errors import DataError, PlanError
from treering.curvature.entry import Counts
from treering.curvature.statistics import Ring, Statistics, in_memory, sizes
from treering.curvature.sums import NewSum, Sum, reduced
from treering.technique import recompute_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from treering.anatomy import Anatomy

_RECENT = 8  # inputs of this forward that are remembered: those that two linears share follow each other


class Observer:
    """Yielded by `observe`. Every forward of the model counts, except one that is recomputed for the backward."""

    def __init__(
        self,
        anatomy: "Anatomy",
        weights: Iterable[str] | None = None,
        share: bool = True,
        new_sum: NewSum = Sum.empty,
    ):
        self.anatomy, self.share, self.new_sum = anatomy, share, new_sum
        self.sizes = sizes(anatomy)
        chosen = set(self.sizes if weights is None else weights)
        if unknown := chosen - set(self.sizes):
            raise PlanError(
                f"{sorted(unknown)[0]} is not a weight of a linear layer or of experts in a block of the model"
            )
        self.weights = tuple(w for w in self.sizes if w in chosen)
        self.owner: dict[str, str] = {}  # weight -> the one whose sum is also its sum
        self.sums: dict[str, Any] = {}
        self.kinds: dict[str, tuple[torch.dtype, torch.device]] = {}  # of the sums, and of those without a token so far
        self.tokens = 0  # real ones so far, of this rank
        self.real: Tensor | None = None  # of the current forward: [T] bool; None: all tokens count
        self._index: Tensor | None = None
        self._counting: tuple[Tensor | None] | None = None
        self._recent: deque[tuple[Tensor, int | None, str]] = deque(maxlen=_RECENT)

    def __reduce__(self) -> Any:
        """Refuse to be copied: a copy of the model would add to this observer or to a copy of it."""
        raise PlanError(
            "the model is being observed, and a copy would keep the observer's hooks; leave the `with observe` block "
            "before you copy or pickle it"
        )

    @contextmanager
    def counting(self, real: Tensor | None) -> Iterator[None]:
        """Count, in the forwards inside, only the tokens where `real` ([B, S], bool) is true; None: all of them.

        Without it, those of the model's attention_mask count, or all tokens where it has no mask.
        """
        before, self._counting = self._counting, (real,)
        try:
            yield
        finally:
            self._counting = before

    def statistics(self, ring: Ring | None = None, groups: "Sequence[ProcessGroup]" = ()) -> Statistics:
        """Return the means of what was seen so far, on the host; over the ranks of `groups`, which all call it."""
        if not self.counted(groups) and not self.sums:
            raise DataError(
                "no token was seen, so there is nothing to keep: run the model inside the `with observe` block, on "
                "batches whose attention_mask is not all padding"
            )
        tensors: dict[str, Tensor] = {}
        counts: dict[str, Counts] = {}
        for owner, tensor, count in self.means(groups, keep=True):
            tensors[owner], counts[owner] = tensor, count
        ring = ring or Ring(name="", tokens=self.counted(groups))
        return in_memory(self.anatomy.model_type, tensors, self.order(), counts, (ring,))

    def counted(self, groups: "Sequence[ProcessGroup]" = ()) -> int:
        """Return the number of tokens so far; with `groups` a collective."""
        device = next(iter(self.kinds.values()))[1] if self.kinds else None
        return int(reduced(torch.tensor(self.tokens, device=device), groups))

    def order(self) -> dict[str, str]:
        """Return `owner`, in the model's order."""
        return {weight: self.owner[weight] for weight in self.weights if weight in self.owner}

    def means(self, groups: "Sequence[ProcessGroup]" = (), keep: bool = False) -> Iterator[tuple[str, Tensor, Counts]]:
        """Yield (weight, A, tokens) of each sum, one at a time; with `groups` a collective. Without `keep` the sums are
        used up."""
        for owner in dict.fromkeys(self.order().values()):
            total = self.sums.get(owner) if keep else self.sums.pop(owner, None)
            if total is None:
                total = self._empty(owner)
            yield owner, *(total.copy() if keep else total).mean(owner, groups)

    def _empty(self, weight: str) -> Any:
        return self.new_sum(weight, self.sizes[weight], *self.kinds[weight])

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Determine, before the model's forward, which of its tokens count."""
        self._recent.clear()
        if recompute_state() != "forward":
            return
        arguments = dict(zip(inspect.signature(model.forward).parameters, args)) | dict(kwargs)
        tokens = next((arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None), None)
        mask = arguments.get("attention_mask") if self._counting is None else self._counting[0]
        self.real = _mask(mask, tokens)
        self._index = None if self.real is None else self.real.nonzero().squeeze(1)
        if tokens is not None:
            every = tokens.shape[0] * tokens.shape[1]
            self.tokens += every if self._index is None else self._index.numel()

    def end(self, *_: Any) -> None:
        self._recent.clear()

    def take(self, weight: str, x: Tensor) -> None:
        """Add the inputs of a linear layer."""
        if not isinstance(x, Tensor):
            raise PlanError(
                f"a technique computes the inputs of {weight} later, tile by tile; measure the model that was "
                "exported, or a run without tiledblock"
            )
        if recompute_state() != "forward" or not self.owns(weight, x):
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._index is not None:
            self.refuse_unless(rows.shape[0] == self.real.numel(), weight)  # type: ignore[union-attr]
            rows = rows.index_select(0, self._index)
        self.add(weight, rows)

    def refuse_unless(self, known: bool, weight: str) -> None:
        """Raise a PlanError where it is not known which tokens are padding."""
        if not known:
            raise PlanError(
                f"which of the tokens that reach {weight} are padding is not known; measure packed rows, or rows of "
                "one document without padding"
            )

    def add(self, weight: str, rows: Tensor, expert: int | None = None) -> None:
        """Add inputs, T × M, to the sum of `weight`; of a stack, to that of one expert."""
        if rows.shape[0]:
            if weight not in self.sums:
                self.sums[weight] = self._empty(weight)
            self.sums[weight].add(rows, expert)

    def owns(self, weight: str, x: Tensor) -> bool:
        """Return whether these inputs belong to this weight's own sum: no other weight has just seen the same ones.

        They are the same where they are the same memory, referenced since then and not written to since then.
        """
        version = None if x.is_inference() else x._version
        now = (
            next((o for t, v, o in self._recent if v == version and same_memory(t, x)), weight)
            if self.share
            else weight
        )
        known = self.owner.setdefault(weight, now)
        if known != weight and now != known:
            raise PlanError(
                f"{weight} and {known} had the same inputs in one forward and others in another; measure them apart: "
                "observe(…, share=False)"
            )
        if known == weight:
            self.kinds.setdefault(weight, (torch.promote_types(x.dtype, torch.float32), x.device))
            self._recent.append((x, version, weight))
        return known == weight


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same values in the same place."""
    if a is b:
        return not a.is_inference()  # torch does not count the writes to an inference tensor
    facts = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (a, b) if t.numel()]
    return len(facts) == 2 and facts[0] == facts[1] and not a.is_inference()


def _mask(mask: Any, tokens: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise PlanError("which tokens are real is not known from this attention_mask; use counting(mask), [B, S]")
    if tokens is not None:
        mask = mask[:, -tokens.shape[1] :]  # the mask of a cached generation has earlier tokens too
        if mask.shape != tokens.shape[:2]:
            raise PlanError(f"a mask of shape {tuple(mask.shape)} for tokens of shape {tuple(tokens.shape[:2])}")
        mask = mask.to(tokens.device)
    flat = mask.reshape(-1) != 0
    return None if bool(flat.all()) else flat
