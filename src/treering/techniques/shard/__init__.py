from treering.techniques.shard.config import Shard

__all__ = ["Shard"]
