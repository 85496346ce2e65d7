"""What passes through the batches have in common, of inputs and of gradients: bits, first peaks, what fits at once.

All of it is the same on every rank, and for any number of ranks.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from treering.curvature.exact_sums import ExactSum, bits_for
from treering.curvature.measured_model import MaskedBatches, MeasuredModel
from treering.curvature.sums import reduced


def bits_of_batches(subject: MeasuredModel, batches: MaskedBatches) -> int:
    """Return the bits of sums over the batches of all ranks. A collective."""
    filled = torch.tensor(sum(real is None or bool(real.any()) for _, real in batches), device=subject.device)
    return bits_for(int(reduced(filled, subject.groups)))


def share_peaks(sums: Iterable[ExactSum]) -> None:
    """Give the sums of every rank the peaks of rank 0, whose first batch is the same for any number of ranks. A
    collective."""
    peaks = [peak for one in sums for peak in one.peaks]
    if peaks and dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat(peaks)
        dist.broadcast(flat, src=0)
        for peak, value in zip(peaks, flat.split([len(peak) for peak in peaks])):
            peak.copy_(value)


def passes_within(limit: int, elements: Mapping[str, int]) -> list[list[str]]:
    """Return the names of each pass, whose sums fit into `limit` bytes together, or that have one sum.

    Args:
        elements: of the sums of each name.
    """
    passes: list[list[str]] = []
    used = limit
    for name, count in elements.items():
        used += ExactSum.BYTES * count
        if used > limit:
            passes.append([])
            used = ExactSum.BYTES * count
        passes[-1].append(name)
    return passes
