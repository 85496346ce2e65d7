from treering.full.config import Full

__all__ = ["Full"]
