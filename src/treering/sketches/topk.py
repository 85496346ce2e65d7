"""The largest coordinates of rows: entries of a gap to the coordinate before (uint16) and a value (int8), 3 bytes each.

All rows of a module have the same number of entries, so that an index needs no offsets and its size is known before. A
gap of 65,536 or more takes two entries: the first has the value 0 and moves by 65,536 times its gap. Such a filler
counts as an entry, and the smallest coordinate makes space for it. Entries that are left over have gap and value 0.

    gaps  values                       coordinates
    5     7       17    −3             5, 22
    2     0       9     100            2 · 65,536 + 9
"""

import torch
from torch import Tensor

from treering.sketches.codes import divided, scales_of

STEP = 1 << 16  # what a filler's gap counts
MOST_COORDINATES = 1 << 31  # coordinates are int32
_CHUNK = 64


def encode(x_nD: Tensor, entries: int, restore_norm: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return gaps [n, entries] uint16, values [n, entries] int8 and scales [n] bfloat16 of finite rows.

    Args:
        entries: at most D.
        restore_norm: the scale makes what is kept as long as the complete row, in place of closest to it.
    """
    x = x_nD.float()
    values, coordinates = largest(x, entries)
    scales = scales_of(values, 127)
    codes = divided(values, scales).round_().clamp_(-127, 127)
    kept = codes != 0  # of a coordinate that is rounded to zero nothing is lost
    coordinates = torch.where(kept, coordinates, x.shape[1])  # sorted behind all others
    gaps, stored = pack(coordinates, codes, x.shape[1])
    if restore_norm:
        length = stored.float().norm(dim=1)
        scales = torch.where(length > 0, _norms(x, values[:, :1].abs()) / length, 0).bfloat16()
    return gaps, stored, scales


def pack(coordinates: Tensor, codes: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
    """Return gaps and values of coordinates, those of the largest codes first; a coordinate of `numbers` is none."""
    if numbers > STEP:
        coordinates = _with_space_for_fillers(coordinates, coordinates.shape[1], numbers)
    ordered, order = coordinates.sort(1)
    return _entries(ordered, codes.gather(1, order) * (ordered < numbers), numbers)


def positions(gaps: Tensor, values: Tensor, numbers: int) -> Tensor:
    """Return the coordinate of each entry [n, entries], int32; those of fillers are coordinates too."""
    steps = gaps.to(torch.int32)
    if numbers > STEP and int(values.view(torch.uint8).amin() if values.numel() else 1) == 0:
        # gap · 65,536 where the value is 0: half the time of `where`. Gaps of a module's coordinates do not overflow.
        filler = values.view(torch.bool).logical_not().to(torch.int32)
        steps.addcmul_(steps, filler, value=STEP - 1)
    return steps.cumsum(1, dtype=torch.int32)


def decode(gaps: Tensor, values: Tensor, scales: Tensor, numbers: int) -> Tensor:
    """Return rows [n, numbers], float32, with zeros at all coordinates that were not kept."""
    rows = torch.zeros(len(gaps), numbers, dtype=torch.float32, device=gaps.device)
    rows.scatter_add_(1, positions(gaps, values, numbers).long(), values.float())
    return rows * scales.float()[:, None]


def largest(x_nD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest elements of each row by magnitude, largest first, and their places.

    The largest elements lie in the chunks with the largest maxima, so that only those are searched. Elements of a chunk
    are far apart: maxima of neighbours are then computed side by side, 8 times as fast as one after the other.
    """
    D = x_nD.shape[1]
    chunks = D // _CHUNK
    if chunks < 4 * count:
        places = x_nD.abs().topk(count, 1).indices
        return x_nD.gather(1, places), places
    whole, tail = x_nD[:, : chunks * _CHUNK].unflatten(1, (_CHUNK, chunks)), x_nD[:, chunks * _CHUNK :]
    highest = torch.maximum(whole.amax(1), whole.amin(1).neg_())
    chosen = highest.topk(count, 1).indices.sort(1).values[:, None, :].expand(-1, _CHUNK, -1)
    found = whole.gather(2, chosen).flatten(1)
    where = (chosen + chunks * torch.arange(_CHUNK, device=x_nD.device)[:, None]).flatten(1)
    ends = torch.arange(chunks * _CHUNK, D, device=x_nD.device).expand(len(x_nD), -1)
    found, where = torch.cat([found, tail], 1), torch.cat([where, ends], 1)
    places = found.abs().topk(count, 1).indices
    return found.gather(1, places), where.gather(1, places)


def _norms(x: Tensor, most: Tensor) -> Tensor:
    """Return the norm of each row, whose largest magnitude is `most`. Squares must not vanish or overflow."""
    norms = torch.linalg.vector_norm(x, dim=1)
    extreme = ((most < 1e-15) | (most > 1e15))[:, 0]
    if bool(extreme.any()):
        norms[extreme] = torch.linalg.vector_norm(x[extreme], dim=1, dtype=torch.float64).float()
    return norms


def _with_space_for_fillers(coordinates: Tensor, entries: int, D: int) -> Tensor:
    """Return coordinates, largest values first, without the last ones where fillers need their entries."""
    rank = torch.arange(coordinates.shape[1], device=coordinates.device)
    while True:
        inside = coordinates < D
        count = inside.sum(1)
        excess = count + (_gaps(coordinates.sort(1).values, D) >= STEP).sum(1) - entries
        if not bool((excess > 0).any()):
            return coordinates
        # Without its last coordinate a row needs one or no entry less, so that none is taken off too early.
        last = torch.where(inside, rank, -1).amax(1, keepdim=True)
        coordinates = torch.where((excess > 0)[:, None] & (rank > last - excess[:, None]), D, coordinates)


def _gaps(ordered: Tensor, D: int) -> Tensor:
    """Return the distance of each coordinate to the one before; 0 for those that are none."""
    gaps = ordered.diff(dim=1, prepend=ordered.new_zeros(len(ordered), 1))
    return torch.where(ordered < D, gaps, 0)


def _entries(ordered: Tensor, codes: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Return gaps and values, with fillers before the coordinates that need one."""
    n, entries = ordered.shape
    gaps = _gaps(ordered, D)
    far = gaps >= STEP
    place = torch.arange(entries, device=ordered.device) + far.cumsum(1)
    place = torch.where(ordered < D, place, entries)  # one column more, for what is none
    out_gaps, out_values = gaps.new_zeros(n, entries + 1), codes.new_zeros(n, entries + 1)
    out_gaps.scatter_(1, place, gaps % STEP)
    out_values.scatter_(1, place, codes)
    out_gaps.scatter_(1, torch.where(far, place - 1, entries), gaps // STEP)
    return _uint16(out_gaps[:, :-1]), out_values[:, :-1].to(torch.int8)


def _uint16(x: Tensor) -> Tensor:
    return x.to(torch.int32).to(torch.uint16).contiguous()
