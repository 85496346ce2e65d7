from treering.osft.config import OSFT

__all__ = ["OSFT"]
