"""Results of splitting, written once and sliced by every rank: cache, restart and resume are one reader."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1


def digest(tensor: Tensor) -> str:
    """Of the values, bit for bit, with dtype and shape."""
    held = tensor.detach().cpu().contiguous()
    words = xxhash.xxh3_128(json.dumps([str(held.dtype), list(held.shape)]).encode())
    words.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return words.hexdigest()


def key(*ingredients: str) -> str:
    """The name of a result: of everything it depends on, so that a change of anything misses the cache."""
    return xxhash.xxh3_128("\0".join([str(FORMAT), torch.__version__, *ingredients]).encode()).hexdigest()


class Prepared:
    """A folder of safetensors files named by their ingredients. A file is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        try:
            with safe_open(self.path(name), "pt") as file:
                return bool(file.keys())
        except (OSError, SafetensorError):  # absent, or cut short by a full disk: made again
            return False

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            os.replace(temporary, self.path(name))
        finally:
            temporary.unlink(missing_ok=True)

    def rows(self, name: str, tensor: str, start: int, stop: int) -> Tensor:
        with safe_open(self.path(name), "pt") as file:
            return file.get_slice(tensor)[start:stop]
