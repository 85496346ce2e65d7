"""Hugging Face folders as files: which file holds which tensor, and what identifies the weights."""

from pathlib import Path

import xxhash

from treering.core.errors import CheckpointError
from treering.store.untrusted import Header, basename, in_folder, read_header, read_json

INDEX = "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 64, 64 << 10  # of each file that a fingerprint reads


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return tensor name -> file. Names in the index must be plain names of regular files in the folder."""
    return {name: path for name, (path, _) in tensor_headers(folder).items()}


def tensor_headers(folder: Path) -> dict[str, tuple[Path, Header]]:
    """Return tensor name -> file, and the tensor's entry in the header of that file."""
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
    headers: dict[str, tuple[Path, Header]] = {}
    for name in listed:
        path = in_folder(folder, name)
        if path is None:
            raise CheckpointError(f"{folder} lacks {name}, which its index names")
        for tensor in read_header(path):
            if tensor.name in headers:
                other = headers[tensor.name][0].name
                raise CheckpointError(f"{tensor.name} is in {other} and in {name}; which is meant?")
            headers[tensor.name] = path, tensor
    return headers


def _pickles(folder: Path) -> str:
    seen = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    return f"; {seen[0]} is a pickle and never read: convert it to safetensors where you trust it" if seen else ""


def fingerprint(folder: Path) -> str:
    """Return what identifies the weights of a folder: a digest of names, sizes, headers and samples of the content.

    Not of every byte: a model of a hundred billion parameters would take minutes. Training changes every value a
    little, so that any sample distinguishes other weights of the same shapes.
    """
    words = xxhash.xxh3_128()
    for path in sorted(set(tensor_files(folder).values())):
        size = path.stat().st_size
        words.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for place in range(SAMPLES):
                file.seek(place * size // SAMPLES)
                words.update(file.read(SAMPLE_BYTES))
    return words.hexdigest()
