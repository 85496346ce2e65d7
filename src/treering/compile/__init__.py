from treering.compile.config import Compile

__all__ = ["Compile"]
