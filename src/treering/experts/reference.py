"""The products of `products.py` and the exchange of `dispatch.py` as loops over experts: plain and slow."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with its rows."""
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield expert, slice(start, stop)
        start = stop


def rows_by_stack(x_SK: Tensor, w_EKN: Tensor, offsets: Tensor) -> Tensor:
    out = x_SK.new_zeros(x_SK.shape[0], w_EKN.shape[2])
    for expert, rows in groups(offsets):
        out[rows] = x_SK[rows] @ w_EKN[expert]
    return out


def rows_by_rows(x_SK: Tensor, g_SN: Tensor, offsets: Tensor) -> Tensor:
    out = x_SK.new_zeros(len(offsets), x_SK.shape[1], g_SN.shape[1])
    for expert, rows in groups(offsets):
        out[expert] = x_SK[rows].mT @ g_SN[rows]
    return out


def low_rank(x_SM: Tensor, A_ErM: Tensor, B_ENr: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """As autograd differentiates it."""
    pieces = [x_SM[rows] @ A_ErM[e].mT @ B_ENr[e].mT * scale for e, rows in groups(offsets)]
    return torch.cat(pieces) if pieces else x_SM @ A_ErM[0].mT @ B_ENr[0].mT


def dispatched(
    hidden: Sequence[Tensor],
    chosen: Sequence[Tensor],
    weights: Sequence[Tensor],
    expert: Callable[[int, Tensor], Tensor],
    experts: int,
) -> list[Tensor]:
    """Return the output for the tokens of each rank, as if all ranks were this process.

    Args:
        hidden: of each rank, [T, M].
        chosen, weights: of each rank, [T, choices].
        expert: (number, rows [R, M]) → rows: what the owner of an expert computes, for the rows of all ranks at once.
        experts: their number.
    """
    out = [torch.zeros_like(h) for h in hidden]
    for number in range(experts):
        pairs = [(one == number).nonzero() for one in chosen]
        results = expert(number, torch.cat([h[pair[:, 0]] for h, pair in zip(hidden, pairs)]))
        for rank, (pair, own) in enumerate(zip(pairs, results.split([len(pair) for pair in pairs]))):
            weighted = own * weights[rank][pair[:, 0], pair[:, 1], None]
            out[rank] = out[rank].index_add(0, pair[:, 0], weighted)
    return out
