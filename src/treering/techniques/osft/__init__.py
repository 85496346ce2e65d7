from treering.techniques.osft.config import OSFT

__all__ = ["OSFT"]
