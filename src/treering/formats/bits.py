"""Bytes and bit fields: how codes and scales are laid out in uint8 tensors.

Every tensor of a packed weight is uint8, scales as views of their bytes: gloo cannot send float8, and FSDP2's mixed
precision would round a floating-point scale to the compute dtype.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def constant(values: Sequence[float], device: torch.device) -> Tensor:
    """Return a small float32 table on `device`, the same one each time: a copy to a card would wait for the card.

    Where memory is planned tensors are of no device, and none is kept.
    """
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        if len(values) == 1:  # torch would compute with the one number, on the stand-in
            return torch.full((1,), values[0], device=device)
        return torch.tensor(values).to(device)  # made on the CPU: a stand-in for a device makes none from numbers
    return _kept(tuple(values), device)


@cache
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values).to(device)


def divided(x: Tensor, number: float) -> Tensor:
    """Return x / number, rounded once on every device: CUDA would multiply by the rounded inverse of a plain number."""
    return x / constant((number,), x.device).to(x.dtype)


def as_bytes(t: Tensor) -> Tensor:
    """Return the bytes of `t` as uint8, [..., n * itemsize], in the machine's (little-endian) order."""
    return t.contiguous().view(torch.uint8)


def from_bytes(t_bytes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor of `dtype` whose bytes are `t_bytes`; the last dimension shrinks by its item size."""
    aligned = t_bytes.contiguous()
    # A view as a wider type needs an aligned start, which a slice of a larger tensor may lack.
    return (aligned.clone() if aligned.storage_offset() % dtype.itemsize else aligned).view(dtype)


def pack_nibbles(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Return two 4-bit codes in each byte: even columns in the low half, or in the high half with `high_first`."""
    even, odd = codes[..., 0::2], codes[..., 1::2]
    return (odd | (even << 4)) if high_first else (even | (odd << 4))


def unpack_nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """Return the 4-bit codes of `packed` as uint8, [..., 2 * bytes]. Inverse of `pack_nibbles`."""
    low, high = packed & 15, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def look_up_nibbles(packed: Tensor, table: Tensor, *, high_first: bool = False) -> Tensor:
    """Return table[code] for every 4-bit code of `packed`, [..., 2 * bytes].

    One look-up for a byte and its two values: half the indices, and no tensor of unpacked codes.
    """
    pairs = table[unpack_nibbles(torch.arange(256, device=table.device), high_first=high_first)].view(256, 2)
    return pairs.index_select(0, packed.flatten().int()).view(*packed.shape[:-1], 2 * packed.shape[-1])


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of a row of `columns` codes: whole 32-bit words, as compressed-tensors writes them."""
    return -(-columns * bits // 32) * 4


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned codes as one little-endian bit stream a row: code i occupies bits i·b to (i+1)·b.

    Rows end at a multiple of 32 bits, filled with zeros.
    """
    columns = codes.shape[-1]
    # Eight codes of b bits are exactly b bytes.
    padded = torch.nn.functional.pad(codes, (0, -columns % 8)).long().unflatten(-1, (-1, 8))
    words = (padded << (torch.arange(8, device=codes.device) * bits)).sum(-1, keepdim=True)
    stream = ((words >> (torch.arange(bits, device=codes.device) * 8)) & 255).to(torch.uint8).flatten(-2)
    length = row_bytes(columns, bits)
    return torch.nn.functional.pad(stream, (0, max(0, length - stream.shape[-1])))[..., :length].contiguous()


def unpack_stream(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the `columns` unsigned codes of each row as uint8. Inverse of `pack_stream`."""
    if bits == 4:
        return unpack_nibbles(packed)[..., :columns]
    if bits == 8:
        return packed[..., :columns]
    groups = -(-columns // 8)
    stream = torch.nn.functional.pad(packed, (0, max(0, groups * bits - packed.shape[-1])))[..., : groups * bits]
    octets = stream.unflatten(-1, (groups, bits)).long()
    words = (octets << (torch.arange(bits, device=packed.device) * 8)).sum(-1, keepdim=True)
    codes = (words >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :columns]
