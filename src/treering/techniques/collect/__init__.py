from treering.techniques.collect.config import Collect

__all__ = ["Collect"]
