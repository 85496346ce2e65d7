from treering.recompute.config import Recompute

__all__ = ["Recompute"]
