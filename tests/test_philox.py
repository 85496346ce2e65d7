"""Philox against published values, and its numbers' independence of shape, order and device."""

import torch

from treering.core.philox import key, philox, uniform, words

# From the known answers of Random123, philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_known_answers():
    for counter, words_of_key, result in KNOWN:
        four = philox(tuple(torch.tensor([c]) for c in counter), words_of_key)
        assert tuple(int(word) for word in four) == result


def test_a_number_depends_on_its_place_alone():
    rows = torch.tensor([5, 0, 2**40 + 3, 17])
    whole = words(key(1, "a"), rows, 10)
    assert torch.equal(words(key(1, "a"), rows.flip(0), 10).flip(0), whole)
    assert torch.equal(words(key(1, "a"), rows, 3), whole[:, :3])
    assert torch.equal(words(key(1, "a"), rows[2:3], 10), whole[2:3])
    for other in (key(2, "a"), key(1, "b"), key(1, "a", 0)):
        assert not torch.equal(words(other, rows, 10), whole)
    assert words(key(1, "a"), rows[:0], 10).shape == (0, 10)


def test_numbers_are_uniform_and_unrelated():
    u = uniform(key(0, "test"), torch.arange(4000), 50)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), 20, 0, 1)
    assert ((counts - 10_000).abs() < 500).all()
    related = torch.corrcoef(u.T).fill_diagonal_(0).abs().max()
    assert related < 0.1
