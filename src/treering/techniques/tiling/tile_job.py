"""What is computed in tiles, as one value, and the gradients of its inputs, collected over tiles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from treering.technique import TileRows

Out = Literal["cat", "sum"]


class Gradient:
    """The gradient of one input, collected over tiles: its rows, where the input is cut; a sum, where tiles share it.

    Sums are kept in float32 or wider and rounded once at the end (`wide`): added up in bfloat16, a thousand tiles
    would lose a tenth of the digits that there are.
    """

    def __init__(self, like: Tensor, *, cut: bool, tiles: int, wide: bool):
        self.like, self.cut, self.tiles = like, cut, tiles
        self.dtype = torch.promote_types(like.dtype, torch.float32) if wide else like.dtype
        self.value: Tensor | None = None
        self.owned = False

    def add(self, gradient: Tensor | None, start: int, stop: int) -> None:
        """Add the gradient that the tile of tokens `start` to `stop` gave."""
        if self.cut and self.tiles > 1:
            self._rows(gradient, start, stop)
        elif gradient is None:
            return
        elif self.value is None:
            self.value = gradient  # not a copy: autograd may have given the same tensor to another input as well
        elif not self.owned:
            self.value, self.owned = self.value.to(self.dtype) + gradient, True
        else:
            self.value.add_(gradient)

    def add_product(self, g_TN: Tensor, x_TM: Tensor) -> None:
        """Add gᵀ x, the gradient that a tile gives to a weight [N, M]: in the product itself where the device can."""
        if self.value is None:
            self.value = _product(g_TN.t(), x_TM, self.dtype)
        elif not self.owned:
            self.value = _add_product(self.value.to(self.dtype, copy=True), g_TN.t(), x_TM)
        else:
            _add_product(self.value, g_TN.t(), x_TM)
        self.owned = True

    def _rows(self, gradient: Tensor | None, start: int, stop: int) -> None:
        if gradient is None and self.value is None:
            return
        if self.value is None:
            self.value = torch.empty(self.like.shape, dtype=self.like.dtype, device=self.like.device)
            self.value[:start].zero_()
        if gradient is None:
            self.value[start:stop].zero_()
        else:
            self.value[start:stop].copy_(gradient)

    def result(self) -> Tensor | None:
        """Return the gradient in the dtype of the input; None if no tile gave one."""
        return None if self.value is None else self.value.to(self.like.dtype)


def _sums_wide(a: Tensor, dtype: torch.dtype) -> bool:
    """Return whether one kernel multiplies matrices in bfloat16 or float16 and adds the result to one in float32."""
    without = a.device.type in ("cpu", "xpu", "mps", "meta") or torch.version.hip is not None
    return a.dtype != dtype == torch.float32 and not without


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a, b, out_dtype=dtype) if _sums_wide(a, dtype) else (a @ b).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `total`, to which a b was added."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if _sums_wide(a, total.dtype):
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(a @ b)


@dataclass(frozen=True, kw_only=True)
class TileJob:
    """`bounds` cut dimension 0 of the inputs that `cut` marks; each tile sees all of the others."""

    body: Callable[..., Any]
    bounds: tuple[tuple[int, int], ...]
    tokens: int  # so many inputs are kept for the backward; those after them are weights, kept by reference
    cut: tuple[bool, ...]
    out: Out
    wide: bool  # sums in float32
    lead: tuple[int, ...] = ()  # the shape of the result's rows; allocated so, because FSDP warns of views
    unread: frozenset[int] = frozenset()  # of the calls of F.linear in `body`: see `products`

    def tile(self, inputs: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """Return what `body` gets for tokens `start` to `stop`."""
        single = len(self.bounds) == 1
        return [x[start:stop] if cut and not single else x for x, cut in zip(inputs, self.cut)]

    def place(self, start: int, stop: int) -> TileRows:
        """Return which rows, of all, a tile has."""
        return TileRows(start=start, stop=stop, total=self.bounds[-1][1], of_tokens=self.cut[0])

    def rows(self, gradient: Tensor) -> Tensor:
        """Return the gradient of a result with one row for each token."""
        return gradient.flatten(0, len(self.lead) - 1) if self.lead else gradient

    def shared(self, tile: Sequence[Tensor], sums: Mapping[int, Gradient]) -> dict[int, Gradient]:
        """Return, by the id of a tile's inputs, the gradients that are sums over several tiles."""
        if len(self.bounds) == 1:
            return {}
        return {id(tile[i]): gradient for i, gradient in sums.items() if not self.cut[i]}

    def gradients(self, inputs: Sequence[Tensor], needed: Sequence[bool]) -> dict[int, Gradient]:
        """Return by index the gradients to collect, nothing added yet."""
        return {
            i: Gradient(x, cut=self.cut[i], tiles=len(self.bounds), wide=self.wide)
            for i, (x, wanted) in enumerate(zip(inputs, needed))
            if wanted
        }
