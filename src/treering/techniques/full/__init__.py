from treering.techniques.full.config import Full

__all__ = ["Full"]
