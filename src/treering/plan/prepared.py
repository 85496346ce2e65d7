"""Results of splitting, written once and sliced by every rank, and used only after their digests were compared.

    KEY.safetensors     one result: its tensors, and in the header's metadata its key and the digest of each tensor

Files that an earlier version wrote have no digests. They are computed again, as are damaged ones. An undamaged result
is never replaced or removed: checkpoints name it by its digest and rely on its bits, which another library or device
would not compute again.
"""

import json
import os
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.store import disk
from treering.store.layout import DTYPES
from treering.store.tensor_writer import TensorWriter, content_of

FORMAT = 1
METADATA = "treering"
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{32}\.tmp")
ERROR = "lost"  # the tensor with ‖join(split(W)) − W‖/‖W‖, kept with the tensors
DTYPE_OF = {name: getattr(torch, dtype) for dtype, name in DTYPES.items()}


def digest(tensor: Tensor) -> str:
    """Return a digest of the values, bit for bit, with dtype and shape."""
    state = xxhash.xxh3_128(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    state.update(content_of(tensor.detach().cpu()))
    return state.hexdigest()


def key(*inputs: str) -> str:
    """Return the name of a result: a digest of all that it depends on, so that any change misses the cache."""
    return xxhash.xxh3_128("\0".join([str(FORMAT), torch.__version__, *inputs]).encode()).hexdigest()


def label(weight: str, start: int, stop: int, pieces: int) -> str:
    """Return the name under which a result is recorded: its plain weight, with its rows if there are several pieces."""
    return weight if pieces == 1 else f"{weight}[{start}:{stop}]"


def weight_of(name: str) -> str:
    """Return the plain weight of a `label`."""
    return name.partition("[")[0]


@dataclass(frozen=True, kw_only=True)
class PreparedTensor:
    """A tensor of the results of one weight, a `LazyTensor`: the rows of its pieces, one after the other."""

    prepared: "Prepared"
    results: tuple[str, ...]
    name: str
    lengths: tuple[int, ...]  # rows of each piece
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def start(self) -> int:
        return 0

    @property
    def stored(self) -> None:
        return None

    def read(self) -> Tensor:
        pieces = [self.prepared.read(result, self.name) for result in self.results]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, start: int, stop: int) -> Tensor:
        pieces, first = [], 0
        for result, length in zip(self.results, self.lengths, strict=True):
            begin, end = max(start, first), min(stop, first + length)
            if begin < end or len(self.results) == 1:
                pieces.append(self.prepared.rows(result, self.name, begin - first, end - first))
            first += length
        if not pieces:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Prepared:
    """A folder of safetensors files, named by a digest of what they depend on. A file is complete or does not exist.

    `results` are those from which a run has the values of a plain weight's parts: `label` -> name of the result.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.results: dict[str, str] = {}
        self.bytes = 0  # of all results of the run, for messages; 0: not known yet
        self._by_digest: dict[str, str] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {folder} for prepared tensors cannot be created: {error.strerror}"
            ) from None

    def path(self, name: str) -> Path:
        """Return the file of the result `name`."""
        return self.folder / f"{name}.safetensors"

    def problem(self, name: str, tensors: Collection[str]) -> str | None:
        """Read the complete result `name`. Return "" if it is as written and has `tensors`, None if there is no such
        result, else what is wrong with it."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
            description = self._described(name)
            if description is None:
                return "written by an earlier version, without digests"
            if description["key"] != name or set(description["digests"]) != names:
                return "damaged: its header does not belong to it"
            if missing := sorted(set(tensors) - names):
                return f"damaged: it lacks {missing[0]}"
            for tensor, wanted in description["digests"].items():
                with safe_open(path, "pt") as file:  # reopened: an open file keeps every page that was read
                    if digest(file.get_tensor(tensor)) != wanted:
                        return f"damaged: {tensor} has other values than were written"
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return f"damaged: it cannot be read ({type(error).__name__})"
        return ""

    def _described(self, name: str) -> dict[str, Any] | None:
        with safe_open(self.path(name), "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
        return None if text is None else json.loads(text)

    def digest(self, name: str) -> str:
        """Return the digest of a result, of the names and digests of its tensors; its key is not part of it."""
        try:
            description = self._described(name)
        except (OSError, SafetensorError, ValueError) as error:
            raise self._unreadable(name, error) from None
        assert description is not None, "a result that was read has digests"
        return _combined(description["digests"])

    def find(self, wanted: str) -> str | None:
        """Return the name of the result with the digest `wanted`, by its header; None if there is none."""
        if self._by_digest is None:
            self._by_digest = {}
            for path in sorted(self.folder.glob("*.safetensors")):
                with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
                    if description := self._described(path.stem):
                        self._by_digest[_combined(description["digests"])] = path.stem
        return self._by_digest.get(wanted)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a result under a temporary name, read it again, and only then rename it.

        If another process wrote an undamaged result of this name meanwhile, that one stays: a run may be using it.
        """
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        description = json.dumps({"key": name, "digests": {n: digest(t) for n, t in sorted(tensors.items())}})
        writer = TensorWriter(tensors, file=temporary.name, limit=None, metadata={METADATA: description})
        try:
            with disk.writing_in(self.folder, LEFTOVER):
                writer.open(self.folder)
                for tensor_name, tensor in tensors.items():
                    writer.add(tensor_name, tensor.cpu())
                writer.close()
                writer.check()
                try:
                    os.link(temporary, self.path(name))
                except OSError:  # there is one, or the file system has no links
                    if self.problem(name, tensors) != "":
                        os.replace(temporary, self.path(name))
                disk.sync(self.folder)
        except OSError as error:
            every = f", all results of the run together {self.bytes / 2**20:,.1f} MiB" if self.bytes else ""
            raise CheckpointError(
                f"{self.path(name)} cannot be written: {error.strerror}; it needs {writer.bytes / 2**20:,.1f} MiB"
                f"{every}, and {disk.free(self.folder) / 2**20:,.1f} MiB are free there; free some space, or give "
                "prepared tensors another folder. Results that are complete are used again"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def name(self, weight: str, pieces: Sequence[tuple[int, int, str]]) -> None:
        """Record the results of a weight, (first row, row after the last, name) of each piece in order."""
        for old in self.labels(weight):
            del self.results[old]
        self.results |= {label(weight, start, stop, len(pieces)): name for start, stop, name in pieces}

    def labels(self, weight: str) -> list[str]:
        """Return the labels of a weight's results, in the order of their rows."""
        labels = [one for one in self.results if weight_of(one) == weight]
        return sorted(labels, key=lambda one: int(one.partition("[")[2].partition(":")[0] or 0))

    def tensor(self, weight: str, tensor: str) -> PreparedTensor:
        """Return a tensor of a weight's results without reading its values."""
        results = tuple(self.results[one] for one in self.labels(weight))
        shapes = []
        for result in results:
            try:
                with safe_open(self.path(result), "pt") as file:
                    rows = file.get_slice(tensor)
                    shapes.append(tuple(rows.get_shape()))
                    dtype = DTYPE_OF[rows.get_dtype()]
            except (OSError, SafetensorError) as error:
                raise self._unreadable(result, error) from None
        lengths = tuple(shape[0] if shape else 1 for shape in shapes)
        shape = shapes[0] if len(shapes) == 1 else (sum(lengths), *shapes[0][1:])
        return PreparedTensor(prepared=self, results=results, name=tensor, lengths=lengths, shape=shape, dtype=dtype)

    def rows(self, name: str, tensor: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor of a result."""
        try:
            with safe_open(self.path(name), "pt") as file:
                return file.get_slice(tensor)[start:stop]
        except (OSError, SafetensorError) as error:
            raise self._unreadable(name, error) from None

    def read(self, name: str, tensor: str) -> Tensor:
        """Return a complete tensor of a result."""
        try:
            with safe_open(self.path(name), "pt") as file:
                return file.get_tensor(tensor)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path(name)} was complete and cannot be read now: {error}")


def _combined(digests: Mapping[str, str]) -> str:
    """Return one digest of several, without that of the error, which may depend on the number of threads."""
    state = xxhash.xxh3_128()
    for name, of_tensor in sorted(digests.items()):
        if name != ERROR:
            state.update(f"{name}\0{of_tensor}\0".encode())
    return state.hexdigest()
