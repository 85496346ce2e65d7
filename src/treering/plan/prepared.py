"""Results of splitting, written once and sliced by every rank, and believed only after their digests were compared.

    KEY.safetensors     one result: its tensors, and in the header's metadata its key and the digest of each tensor

Files that an earlier version wrote have no digests. They are made again, as are damaged ones: what is in here can
always be made of the model and the statistics.
"""

import json
import os
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.store.tensor_writer import Writer, content_of, sync

FORMAT = 1
METADATA = "treering"


def digest(tensor: Tensor) -> str:
    """Of the values, bit for bit, with dtype and shape."""
    words = xxhash.xxh3_128(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    words.update(content_of(tensor.detach().cpu()))
    return words.hexdigest()


def key(*ingredients: str) -> str:
    """The name of a result: of everything it depends on, so that a change of anything misses the cache."""
    return xxhash.xxh3_128("\0".join([str(FORMAT), torch.__version__, *ingredients]).encode()).hexdigest()


class Prepared:
    """A folder of safetensors files named by their ingredients. A file is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {folder} for prepared tensors cannot be made: {error.strerror}"
            ) from None

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def problem(self, name: str, tensors: Collection[str]) -> str | None:
        """Read the whole result `name`. Returns "" if it is what was written and holds `tensors`; None if there is
        none; else what is wrong with it."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get(METADATA)
                if told is None:
                    return "written by an earlier version, without digests"
                said = json.loads(told)
                if said["key"] != name or set(said["digests"]) != set(file.keys()):
                    return "damaged: its header does not belong to it"
            if missing := sorted(set(tensors) - set(said["digests"])):
                return f"damaged: it lacks {missing[0]}"
            for tensor, wanted in said["digests"].items():
                with safe_open(path, "pt") as file:  # anew: an open file keeps every page that was looked at
                    if digest(file.get_tensor(tensor)) != wanted:
                        return f"damaged: {tensor} has other values than were written"
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return f"damaged: it cannot be read ({type(error).__name__})"
        return ""

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Through to the disk, read again, and only then under its name."""
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        said = json.dumps({"key": name, "digests": {n: digest(t) for n, t in sorted(tensors.items())}})
        writer = Writer(tensors, file=temporary.name, limit=None, metadata={METADATA: said})
        try:
            writer.open(self.folder)
            for own, tensor in tensors.items():
                writer.add(own, tensor.cpu())
            writer.close()
            writer.check()
            os.replace(temporary, self.path(name))
            sync(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"{self.path(name)} cannot be written: {error.strerror}; make room, or give prepared tensors another "
                "folder"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def rows(self, name: str, tensor: str, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.path(name), "pt") as file:
                return file.get_slice(tensor)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path(name)} was found whole and cannot be read now: {error}") from None
