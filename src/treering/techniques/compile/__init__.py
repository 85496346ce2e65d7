from treering.techniques.compile.config import Compile

__all__ = ["Compile"]
