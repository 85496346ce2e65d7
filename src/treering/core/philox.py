"""Random numbers that are a function of where they are used: Philox4x32-10, vectorised.

A torch generator gives another number for an element when the shape or the order changes. Here element (row, column)
has a number of its own for each key, so it is the same for one document or a batch, on one rank or many, in any order.
"""

import torch
from torch import Tensor

from treering.core.seeds import derive

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def key(seed: int, *names: str | int) -> tuple[int, int]:
    """Return the two 32-bit words of the key for `names`."""
    number = derive(seed, *names)
    return number & _MASK, number >> 32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10 for each counter; words are int64 tensors with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(key: tuple[int, int], rows: Tensor, columns: int) -> Tensor:
    """Return [rows, columns] integers below 2^32, int64: element (r, c) depends on the key, rows[r] and c alone.

    Args:
        key: see `key`.
        rows: int64, 0 and larger: a token's place in the data, for example.
        columns: how many numbers each row needs; more columns leave the first ones as they are.
    """
    blocks = torch.arange(-(-columns // 4), device=rows.device)
    shape = (len(rows), len(blocks))
    low, high = (part[:, None].expand(shape) for part in (rows & _MASK, rows >> 32))
    zero = torch.zeros(shape, dtype=torch.int64, device=rows.device)
    four = philox((blocks.expand(shape), low, high, zero), key)
    return torch.stack(four, -1).flatten(1)[:, :columns]


def uniform(key: tuple[int, int], rows: Tensor, columns: int) -> Tensor:
    """Return [rows, columns] numbers in [0, 1), float64; see `words`."""
    return words(key, rows, columns).double() / 2**32


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a · b; the product itself would overflow int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK
