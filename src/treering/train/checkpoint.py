"""Checkpoints on disk: a folder of safetensors files, one a rank, and a manifest that says what is in them.

    step-120/manifest.json            written last, read first
    step-120/rank-00000.safetensors   this rank's rows of every tensor

A folder is made under another name and renamed when whole; what has no manifest, or files that do not match it, is
never loaded. Each tensor's chunks are rows of dimension 0, so any number of ranks can read what any other has written.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from treering.errors import CheckpointError
from treering.plan.place import local, local_rows
from treering.together import from_first, together

FORMAT = 1
NAME = re.compile(r"step-(\d+)")
MANIFEST = "manifest.json"
UNTOUCHED = "; earlier checkpoints are untouched"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    file: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint, read by rows from whichever files hold them."""

    name: str
    entry: Entry
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.entry.dtype)

    def read(self) -> Tensor:
        return self.rows(0, self.shape[0]) if self.shape else self._piece(self.entry.chunks[0], 0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        pieces, at = [], start
        for chunk in sorted(self.entry.chunks, key=lambda c: c.start):
            if chunk.start <= at < chunk.stop and at < stop:
                until = min(stop, chunk.stop)
                pieces.append(self._piece(chunk, at - chunk.start, until - chunk.start))
                at = until
        if at != stop and start != stop:
            raise CheckpointError(f"{self.folder}: rows {at} to {stop} of {self.name} are in no file of the checkpoint")
        return torch.cat(pieces) if pieces else torch.empty((0, *self.shape[1:]), dtype=self.dtype)

    def _piece(self, chunk: Chunk, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.folder / chunk.file, "pt") as file:
                return file.get_slice(self.name)[start:stop] if self.shape else file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:  # a run that goes on removes its old checkpoints
            raise CheckpointError(
                f"{self.folder / chunk.file} was found whole and cannot be read now: {error}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that has been found whole."""

    folder: Path
    step: int
    tensors: Mapping[str, SavedTensor]
    facts: Mapping[str, Any]  # whatever the trainer wrote beside the tensors


def save(root: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write `step-<step>` below `root`. Every rank calls it with its shards; rank 0 publishes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    final = root / f"step-{step}"
    token = from_first(uuid.uuid4().hex[:8])
    temporary = root / f"{final.name}.tmp-{token}"
    together(lambda: temporary.mkdir(parents=True) if rank == 0 else None, f"making {temporary}", UNTOUCHED)
    described = together(lambda: _write_own(temporary, rank, tensors), f"writing {temporary}", UNTOUCHED)

    def publish() -> None:
        entries: dict[str, dict[str, Any]] = {}
        files = {}
        for file, about, own in described:
            files[file] = about
            for name, entry in own.items():
                entries.setdefault(name, {**entry, "chunks": []})["chunks"] += entry["chunks"]
        manifest = {
            "format": FORMAT,
            "step": step,
            "world": world,
            "facts": dict(facts),
            "files": files,
            "tensors": entries,
        }
        path = temporary / MANIFEST
        path.write_text(json.dumps(manifest), encoding="utf-8")
        _sync(path)
        _sync(temporary)
        if final.exists():  # a damaged one of this step was passed over; it is kept, under a name that nothing loads
            os.rename(final, root / f"{final.name}.damaged-{token}")
        os.rename(temporary, final)
        _sync(root)

    together(lambda: publish() if rank == 0 else None, f"publishing {final}", UNTOUCHED)
    return final


def _write_own(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    file = f"rank-{rank:05d}.safetensors"
    held, described = {}, {}
    for name, tensor in tensors.items():
        if not _first_copy(tensor, rank):
            continue
        start, stop = local_rows(tensor)
        # Cloned: an uneven shard is a view of padded storage, and a file must hold the rows alone.
        held[name] = local(tensor).detach().cpu().clone(memory_format=torch.contiguous_format)
        described[name] = asdict(
            Entry(
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                chunks=(Chunk(file=file, start=start, stop=stop),),
            )
        )
        described[name]["chunks"] = list(described[name]["chunks"])
    save_file(held, folder / file)
    _sync(folder / file)
    return file, {"bytes": (folder / file).stat().st_size, "xxh3": _digest(folder / file)}, described


def _first_copy(tensor: Tensor, rank: int) -> bool:
    """Of equal copies one is written: the one at 0 of every axis that replicates."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(i) == 0 for i, p in enumerate(tensor.placements) if isinstance(p, Replicate))


def newest(root: Path, warn: Callable[[str], None]) -> Saved | None:
    """The newest whole checkpoint below `root`; each newer one that is not whole is warned about."""
    found = sorted(((int(m[1]), p) for p in _folders(root) if (m := NAME.fullmatch(p.name))), reverse=True)
    for _, path in found:
        try:
            return read(path)
        except CheckpointError as error:
            warn(f"passed over a checkpoint: {error}")
    return None


def _folders(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []


def read(folder: Path) -> Saved:
    """Open one checkpoint, proving that its files are those the manifest tells of."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}; this version reads {FORMAT}")
        tensors = {}
        for name, entry in manifest["tensors"].items():
            chunks = tuple(Chunk(**chunk) for chunk in entry["chunks"])
            shaped = Entry(shape=tuple(entry["shape"]), dtype=entry["dtype"], chunks=chunks)
            tensors[name] = SavedTensor(name=name, entry=shaped, folder=folder)
        files, step, facts = manifest["files"], int(manifest["step"]), manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no manifest that can be read ({type(error).__name__}: {error})") from None
    for file, about in files.items():
        path = folder / file
        if os.path.basename(file) != file or not path.is_file():
            raise CheckpointError(f"{folder} lacks {file!r}")
        if path.stat().st_size != about["bytes"] or _digest(path) != about["xxh3"]:
            raise CheckpointError(f"{path} is not what was written: its size or digest differs")
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
    return Saved(folder=folder, step=step, tensors=tensors, facts=facts)


def prune(root: Path, keep: int, best: int | None, newest: int) -> None:
    """Remove all but the last `keep` up to `newest`, and the best. Torn ones go as well: nothing would ever load them.

    Those after `newest` are damaged, as the run would have gone on from them: they are neither kept count of nor lost.
    """
    for path in _folders(root):
        if re.fullmatch(r"step-\d+\.tmp-[0-9a-f]+", path.name):
            shutil.rmtree(path, ignore_errors=True)
    for step in [step for step in steps(root) if step <= newest][:-keep]:
        if step != best:
            shutil.rmtree(root / f"step-{step}", ignore_errors=True)


def _digest(path: Path) -> str:
    words = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            words.update(block)
    return words.hexdigest()


def _sync(path: Path) -> None:
    """Until this returns, a power cut may undo the write."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(root: Path) -> list[int]:
    """The steps there are checkpoints of, whole or not."""
    return sorted(int(m[1]) for p in _folders(root) if (m := NAME.fullmatch(p.name)))
