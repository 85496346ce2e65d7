from treering.techniques.recompute.config import Recompute

__all__ = ["Recompute"]
