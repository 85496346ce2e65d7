"""The settings of the technique `shard`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """The fields of `Shard`, which documents them."""

    compute: Literal["stored", "bfloat16", "float32"] = "stored"
    reduce: Literal["float32", "bfloat16", "stored"] = "float32"
    reshard: bool = True
    offload: Literal["none", "cpu"] = "none"
    hold: Literal["nothing", "gradients", "all"] = "nothing"
