"""Hugging Face folders as files: which file holds which tensor, what identifies the weights, and writing new ones."""

from pathlib import Path

import xxhash

from treering.core.errors import CheckpointError
from treering.store.untrusted import Header, basename, in_folder, read_header, read_json

INDEX = "model.safetensors.index.json"
LOOKS, LOOK = 64, 64 << 10  # a fingerprint looks at so many places of a file, so many bytes at each


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. Names from the index are plain basenames of regular files, or the folder is refused."""
    return {name: path for name, (path, _) in tensor_headers(folder).items()}


def tensor_headers(folder: Path) -> dict[str, tuple[Path, Header]]:
    """Tensor name -> file, and what the file's header says of it."""
    index = folder / INDEX
    if in_folder(folder, INDEX):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise CheckpointError(f"{index} is not a safetensors index: it has no weight_map")
        listed = sorted({basename(name, index) for name in names.values()})
    elif in_folder(folder, "model.safetensors"):
        listed = ["model.safetensors"]
    else:
        raise CheckpointError(f"{folder} holds no model.safetensors{_pickles(folder)}")
    found: dict[str, tuple[Path, Header]] = {}
    for name in listed:
        path = in_folder(folder, name)
        if path is None:
            raise CheckpointError(f"{folder} lacks {name}, which its index names")
        for tensor in read_header(path):
            if tensor.name in found:
                other = found[tensor.name][0].name
                raise CheckpointError(f"{tensor.name} is in {other} and in {name}; which is meant?")
            found[tensor.name] = path, tensor
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
