"""Clipping that lowers the error: for each group the largest value it keeps, found by trying a few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from treering.formats.layout import Format

CLIPS = tuple(1 - 0.05 * i for i in range(9))  # 1 down to 0.6; smaller ones were best for no group of a trained model


def best_clip(form: Format, weight: Tensor, importance: Tensor | None = None, clips: Sequence[float] = CLIPS) -> Tensor:
    """Return for each group the clip with the smallest squared error, [..., *groups], for `Format.encode`.

    Args:
        form: the number format.
        weight: [..., rows, columns].
        importance: weight of each input's error, [..., columns]: the mean square of what the input carries.
        clips: the candidates; the first wins where errors are equal.
    """
    rows, columns = weight.shape[-2:]
    down, across = form.groups(rows, columns)
    exact = weight.float()
    best = torch.full((*weight.shape[:-2], down, across), clips[0], device=weight.device)
    least = torch.full_like(best, torch.inf)
    for clip in clips:
        decoded = form.decode(form.encode(weight, clip=float(clip)), columns, torch.float32)
        squares = (decoded - exact).square()
        if importance is not None:
            squares = squares * importance.float()[..., None, :]
        error = _sum_groups(squares, down, across)
        better = error < least
        best, least = torch.where(better, clip, best), torch.where(better, error, least)
    return best


def _sum_groups(squares: Tensor, down: int, across: int) -> Tensor:
    """Return the sums over groups [..., down, across]; the last group along a dimension may be shorter."""
    rows, columns = squares.shape[-2:]
    height, width = -(-rows // down), -(-columns // across)
    padded = torch.nn.functional.pad(squares, (0, across * width - columns, 0, down * height - rows))
    return padded.unflatten(-1, (across, width)).unflatten(-3, (down, height)).sum((-3, -1))
