from treering.techniques.ulysses.config import Ulysses

__all__ = ["Ulysses"]
