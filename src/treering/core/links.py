"""A model of the links between ranks: bytes inside a node, bytes between nodes, and a cost for each message."""

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

    def seconds(self, sent: float, ranks: int, stride: int = 1, calls: int = 1) -> float:
        """Return the time for `sent` bytes of one rank, equally many for each other of the group, in so many calls.

        What goes to the same node and to others is sent at the same time.
        """
        if ranks == 1:
            return 0.0
        near = self.neighbours(ranks, stride) - 1
        each = sent / (ranks - 1)
        return max(near * each / self.inside, (ranks - 1 - near) * each / self.between) + calls * self.latency
