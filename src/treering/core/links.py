"""A model of the links between ranks: bytes inside a node, bytes between nodes, and a cost for each message.

A collective that gathers or sums runs as rings, one through each card of a node: of what a rank of k in a node sends,
1/k goes to another node. What each rank has for each other (an all-to-all) is sent there directly.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Links:
    """Speeds at which one rank sends. The defaults are those of a node of 8 H100 with a 400 Gbit card for each.

    Attributes:
        node: Ranks in a node; those with consecutive numbers share one.
        inside, between: Bytes a second to ranks of the same node, and of others.
        latency: Seconds that a collective takes whatever it sends.
        arithmetic: Operations a second of one rank in a matrix product.
    """

    node: int = 8
    inside: float = 350e9
    between: float = 50e9
    latency: float = 20e-6
    arithmetic: float = 400e12

    def neighbours(self, ranks: int, stride: int = 1) -> int:
        """Return how many of a group of `ranks`, whose numbers differ by `stride`, share a node with the first."""
        return max(1, min(ranks, -(-self.node // stride)))

    def divided(self, sent: float, ranks: int, stride: int = 1, *, ring: bool = False) -> tuple[float, float]:
        """Return how many of `sent` bytes of one rank go to ranks of its node, and how many to other nodes.

        Args:
            ranks, stride: of the group, as for `neighbours`.
            ring: The collective gathers or sums; else there is equally much for each other rank.
        """
        if ranks == 1:
            return 0.0, 0.0
        near = self.neighbours(ranks, stride)
        if near == ranks:
            return sent, 0.0
        away = sent / near if ring else sent * (ranks - near) / (ranks - 1)
        return sent - away, away

    def seconds(self, sent: float, ranks: int, stride: int = 1, calls: int = 1, *, ring: bool = False) -> float:
        """Return the time for `sent` bytes of one rank in so many calls. Both links are used at the same time."""
        if ranks == 1:
            return 0.0
        inside, away = self.divided(sent, ranks, stride, ring=ring)
        return max(inside / self.inside, away / self.between) + calls * self.latency
