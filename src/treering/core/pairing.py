"""Who meets whom in which round, so that each rank exchanges with every other once and with one at a time.

The circle method: with an odd number n of players, i and j meet in round r where i + j ≡ r (mod n), and who would meet
itself rests. With an even number, the last player meets the one who would rest.

    4 ranks   round 0: 0–3, 1–2     round 1: 0–1, 2–3     round 2: 0–2, 1–3
"""


def rounds(ranks: int) -> int:
    """Return the number of rounds: ranks − 1, or `ranks` if it is odd, where each rank rests once."""
    return ranks - 1 + ranks % 2 if ranks > 1 else 0


def partner(rank: int, round_: int, ranks: int) -> int | None:
    """Return whom `rank` meets in a round; None: it rests.

    Example:
        >>> [partner(0, round_, 4) for round_ in range(rounds(4))]
        [3, 1, 2]
    """
    players = ranks - 1 + ranks % 2  # odd
    if rank == players:  # the last of an even number: it meets i with 2 i ≡ r
        return round_ * (players + 1) // 2 % players
    other = (round_ - rank) % players
    if other != rank:
        return other
    return players if ranks % 2 == 0 else None


def schedule(ranks: int) -> list[list[tuple[int, int]]]:
    """Return the pairs of each round, the smaller rank first."""
    return [
        [(rank, other) for rank in range(ranks) if (other := partner(rank, round_, ranks)) is not None and rank < other]
        for round_ in range(rounds(ranks))
    ]
