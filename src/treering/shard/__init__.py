from treering.shard.config import Shard

__all__ = ["Shard"]
