from treering.techniques.tiling.config import TiledBlock, TiledLoss, TiledMLP

__all__ = ["TiledBlock", "TiledLoss", "TiledMLP"]
