"""Every technique, by its key in a configuration: a line below adds one to Treering.

`treering.NAME`, the section `techniques` of the configuration, what `treering plan` proposes, the pages of the docs and
the tests read this list; its order is the one in which they show it. `treering.technique` defines techniques.
"""

# ruff: noqa: I001
from treering.techniques.full import Full as Full
from treering.techniques.lora import LoRA as LoRA
from treering.techniques.osft import OSFT as OSFT
from treering.techniques.quantize import Quantize as Quantize
from treering.techniques.tiling import TiledMLP as TiledMLP
from treering.techniques.tiling import TiledBlock as TiledBlock
from treering.techniques.tiling import TiledLoss as TiledLoss
from treering.techniques.recompute import Recompute as Recompute
from treering.techniques.ulysses import Ulysses as Ulysses
from treering.techniques.shard import Shard as Shard
from treering.techniques.compile import Compile as Compile
from treering.techniques.collect import Collect as Collect

TECHNIQUES: dict[str, type] = {
    name.lower(): value for name, value in tuple(globals().items()) if hasattr(value, "stage")
}
