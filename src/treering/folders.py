"""Hugging Face folders as files: which file holds which tensor, what identifies the weights, and writing new ones."""

import json
import os
from pathlib import Path

import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from treering.errors import CheckpointError

INDEX = "model.safetensors.index.json"
LOOKS, LOOK = 64, 64 << 10  # a fingerprint looks at so many places of a file, so many bytes at each


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. Names from the index are plain basenames of regular files, or the folder is refused."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = sorted(set(names.values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index ({type(error).__name__}: {error})") from None
    elif (folder / "model.safetensors").is_file():
        listed = ["model.safetensors"]
    else:
        raise CheckpointError(f"{folder} holds no model.safetensors{_pickles(folder)}")
    found: dict[str, Path] = {}
    for name in listed:
        if not isinstance(name, str) or os.path.basename(name) != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: {name!r} is not the plain name of a file in this folder; refused")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its index names")
        try:
            with safe_open(path, "pt") as opened:
                found.update(dict.fromkeys(opened.keys(), path))
        except Exception as error:  # safetensors raises its own bare exception type
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    return found


def _pickles(folder: Path) -> str:
    seen = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    return f"; {seen[0]} is a pickle and never read: convert it to safetensors where you trust it" if seen else ""


def fingerprint(folder: Path) -> str:
    """Identifies the weights of a folder: names and sizes of their files, the headers, and samples of the content.

    Not every byte: a model of a hundred billion parameters would take minutes. Training moves every value a little, so
    that other weights of the same shapes show in any sample.
    """
    words = xxhash.xxh3_128()
    for path in sorted(set(tensor_files(folder).values())):
        size = path.stat().st_size
        words.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for place in range(LOOKS):
                file.seek(place * size // LOOKS)
                words.update(file.read(LOOK))
    return words.hexdigest()


class Writer:
    """Writes tensors to a new HF folder as they come, a file per `limit` bytes, and the index at the end."""

    def __init__(self, folder: Path, limit: int = 4 << 30):
        self.folder, self.limit = folder, limit
        self.pending: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.bytes = self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.bytes + size > self.limit:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.bytes += size
        self.total += size

    def _flush(self) -> None:
        save_file(self.pending, self._temporary(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.pending))
        self.pending, self.bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.safetensors.tmp"

    def close(self) -> None:
        if self.pending or not self.files:
            self._flush()
        if len(self.files) == 1:
            os.replace(self._temporary(0), self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files):
            final = f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"
            os.replace(self._temporary(number), self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
