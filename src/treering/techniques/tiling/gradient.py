"""The gradient of one input, collected over tiles."""

import torch
from torch import Tensor


class Gradient:
    """Of an input that is cut: its rows, one after the other. Of one that every tile sees: the sum.

    Sums are kept in float32 or wider and rounded once at the end (`wide`): added up in bfloat16, a thousand tiles
    would lose a tenth of the digits that there are.
    """

    def __init__(self, like: Tensor, *, cut: bool, tiles: int, wide: bool):
        self.like, self.cut, self.tiles = like, cut, tiles
        self.dtype = torch.promote_types(like.dtype, torch.float32) if wide else like.dtype
        self.value: Tensor | None = None
        self.owned = False

    def add(self, gradient: Tensor | None, start: int, stop: int) -> None:
        if self.cut and self.tiles > 1:
            self._rows(gradient, start, stop)
        elif gradient is None:
            return
        elif self.value is None:
            self.value = gradient  # not ours: autograd may have given the same tensor to another input as well
        elif not self.owned:
            self.value, self.owned = self.value.to(self.dtype) + gradient, True
        else:
            self.value.add_(gradient)

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
        return None if self.value is None else self.value.to(self.like.dtype)
