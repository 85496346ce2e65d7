"""The rounds of pairs: a perfect matching in each, every pair once, as few rounds as there can be."""

import pytest

from treering.core.pairing import partner, rounds, schedule


@pytest.mark.parametrize("ranks", range(2, 258))
def test_each_pair_meets_once_and_no_rank_meets_two_at_a_time(ranks):
    made = schedule(ranks)
    assert len(made) == rounds(ranks) == (ranks - 1 if ranks % 2 == 0 else ranks)
    met = set()
    resting = [0] * ranks
    for pairs in made:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy)) == ranks - ranks % 2
        for rank in set(range(ranks)) - set(busy):
            resting[rank] += 1
        met |= set(pairs)
    assert len(met) == ranks * (ranks - 1) // 2
    assert set(resting) == {ranks % 2}  # of an odd number each rests once


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 255, 256])
def test_partners_agree(ranks):
    for round_ in range(rounds(ranks)):
        for rank in range(ranks):
            other = partner(rank, round_, ranks)
            assert other is None or (other != rank and partner(other, round_, ranks) == rank)


def test_one_rank_has_no_rounds():
    assert rounds(1) == 0 and schedule(1) == []
