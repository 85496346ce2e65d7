"""Checkpoints on disk: a folder of safetensors files, one a rank, and a manifest that describes them.

    step-120/manifest.json            written last, read first
    step-120/rank-00000.safetensors   this rank's rows of every tensor

A folder is written under another name and renamed when complete; one without a manifest, or with other files, is
never loaded. Each tensor's chunks are rows of dimension 0, so any number of ranks can read what any other has written.
"""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from treering.core.collectives import from_first, together
from treering.core.errors import CheckpointError
from treering.core.sharded import local, local_rows
from treering.store import disk
from treering.store.layout import DTYPES
from treering.store.tensor_writer import pieces, size
from treering.store.untrusted import read_header, visible
from treering.train.checkpoints import manifest
from treering.train.checkpoints.manifest import Chunk, FileEntry, Manifest, TensorEntry

STEP = re.compile(r"step-(\d{1,18})")
TORN = re.compile(r"step-\d+\.tmp-[0-9a-f]+")
UNTOUCHED = "; earlier checkpoints are untouched"


@dataclass(frozen=True, kw_only=True)
class StagedRows:
    """This rank's rows of one tensor, on the host."""

    shape: tuple[int, ...]  # of the complete tensor
    start: int
    stop: int
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class CheckpointTensor:
    """A tensor of a checkpoint, read by rows from whichever files hold them."""

    name: str
    entry: TensorEntry
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.entry.dtype)

    @property
    def start(self) -> int:
        return 0

    @property
    def stored(self) -> None:
        """Checkpoints hold values as they train."""
        return None

    def read(self) -> Tensor:
        return self.rows(0, self.entry.rows) if self.shape else self._piece(self.entry.chunks[0], 0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        parts, at = [], start
        for chunk in sorted(self.entry.chunks, key=lambda c: c.start):
            if chunk.start <= at < chunk.stop and at < stop:
                until = min(stop, chunk.stop)
                parts.append(self._piece(chunk, at - chunk.start, until - chunk.start))
                at = until
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty((0, *self.shape[1:]), dtype=self.dtype)

    def _piece(self, chunk: Chunk, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.folder / chunk.file, "pt") as file:
                rows = file.get_slice(self.name)[start:stop] if self.shape else file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:  # a run that continues removes its old checkpoints
            raise CheckpointError(
                f"{self.folder / chunk.file} was complete and cannot be read now: {visible(str(error))}"
            ) from None
        if rows.dtype != self.dtype or (self.shape and rows.shape != (stop - start, *self.shape[1:])):
            raise CheckpointError(
                f"{self.folder / chunk.file}: {visible(self.name)} is not what the manifest describes"
            )
        return rows


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint whose files have been verified."""

    folder: Path
    step: int
    tensors: Mapping[str, CheckpointTensor]
    facts: Mapping[str, Any]  # what the trainer wrote next to the tensors
    prepared: Mapping[str, str]  # label of a prepared result -> its digest: they hold the rest of the tensors


def stage(tensors: Mapping[str, Tensor], copy: bool) -> dict[str, StagedRows]:
    """Return this rank's rows on the host. `copy`: in separate memory, as the live tensors may change meanwhile."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    staged = {}
    for name, tensor in tensors.items():
        if _first_copy(tensor, rank):
            live = local(tensor).detach()
            start, stop = local_rows(tensor)
            rows = live.cpu().contiguous()
            if copy and rows.data_ptr() == live.data_ptr():
                rows = rows.clone()
            staged[name] = StagedRows(shape=tuple(tensor.shape), start=start, stop=stop, rows=rows)
    return staged


def write(
    root: Path,
    step: int,
    staged: Mapping[str, StagedRows],
    facts: Mapping[str, Any],
    group: Any = None,
    prepared: Mapping[str, str] | None = None,
) -> Path:
    """Write `step-<step>` in `root`. Every rank calls it with what it has staged; rank 0 publishes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    final = root / f"step-{step}"
    token = from_first(uuid.uuid4().hex[:8], group)
    temporary = root / f"{final.name}.tmp-{token}"

    def all_do(work: Callable[[], Any], doing: str) -> list[Any]:
        try:
            return together(work, doing, UNTOUCHED + f"; {disk.free(root) >> 20} MiB are free there", group)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    all_do(lambda: temporary.mkdir(parents=True) if rank == 0 else None, f"making {temporary}")
    described = all_do(lambda: _write_own(temporary, rank, staged), f"writing {_size(staged)} to {temporary}")

    def publish() -> None:
        chunks: dict[str, list[Chunk]] = {}
        shapes = {}
        for file, _, entries in described:
            for name, (shape, dtype, start, stop) in entries.items():
                shapes[name] = (shape, dtype)
                chunks.setdefault(name, []).append(Chunk(file=file, start=start, stop=stop))
        description = Manifest(
            step=step,
            world=world,
            facts=json.loads(json.dumps(dict(facts))),
            files={file: about for file, about, _ in described},
            tensors={
                name: TensorEntry(shape=shape, dtype=dtype, chunks=tuple(chunks[name]))
                for name, (shape, dtype) in shapes.items()
            },
            prepared=dict(prepared or {}),
        )
        disk.write(temporary / manifest.NAME, [description.dump()], "manifest")
        if final.exists():  # a damaged one of this step was skipped; it is kept, under a name that nothing loads
            disk.move(final, root / f"{final.name}.damaged-{token}", "damaged")
        disk.publish(temporary, final, ("folder", "publish", "root"))

    all_do(lambda: publish() if rank == 0 else None, f"publishing {final}")
    return final


def save(root: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Stage and write in one call."""
    return write(root, step, stage(tensors, copy=False), facts)


def _size(staged: Mapping[str, StagedRows]) -> str:
    return f"{sum(size(p.rows) for p in staged.values()) / 2**20:.1f} MiB"


def _write_own(folder: Path, rank: int, staged: Mapping[str, StagedRows]) -> tuple[str, FileEntry, dict[str, Any]]:
    file = f"rank-{rank:05d}.safetensors"
    length, blocks = disk.write(folder / file, pieces({n: p.rows for n, p in staged.items()}), f"rank {rank}")
    entries = {n: (p.shape, str(p.rows.dtype).removeprefix("torch."), p.start, p.stop) for n, p in staged.items()}
    return file, FileEntry(bytes=length, blocks=blocks), entries


def _first_copy(tensor: Tensor, rank: int) -> bool:
    """Return whether this rank writes the tensor: of equal copies, that at 0 of every axis that replicates."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(i) == 0 for i, p in enumerate(tensor.placements) if isinstance(p, Replicate))


def newest(root: Path, warn: Callable[[str], None]) -> SavedCheckpoint | None:
    """Return the newest complete checkpoint in `root`. `warn` is given the error of each newer one."""
    for step in reversed(steps(root)):
        try:
            return read(root / f"step-{step}")
        except CheckpointError as error:
            warn(f"passed over a checkpoint: {visible(str(error))}")
    return None


def steps(root: Path) -> list[int]:
    """Return the steps that have checkpoints, complete or damaged."""
    return sorted(int(m[1]) for p in _folders(root) if (m := STEP.fullmatch(p.name)))


def _folders(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []


def read(folder: Path) -> SavedCheckpoint:
    """Return a checkpoint after verifying that it is what was written. All ranks call it and share the work."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        described, problem = manifest.load(folder), ""
        for number, (file, about) in enumerate(sorted(described.files.items())):
            if not problem and number % world == rank:
                problem = _verify(folder / file, about, described.tensors)
        named = STEP.fullmatch(folder.name)
        if named and int(named[1]) != described.step:
            problem = problem or f"{folder} holds step {described.step}"
    except CheckpointError as error:
        problem = str(error)
    problems = [text for text in together(lambda: problem, f"reading {folder}") if text]
    if problems:
        raise CheckpointError(visible(problems[0]))  # headers and manifests name tensors as they like
    tensors = {n: CheckpointTensor(name=n, entry=entry, folder=folder) for n, entry in described.tensors.items()}
    return SavedCheckpoint(
        folder=folder, step=described.step, tensors=tensors, facts=described.facts, prepared=described.prepared
    )


def _verify(path: Path, about: FileEntry, tensors: Mapping[str, TensorEntry]) -> str:
    """Return why `path` is not the file that was written; empty if it is."""
    try:
        if path.is_symlink() or not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != about.bytes:
            return f"{path} has {path.stat().st_size} bytes instead of {about.bytes}"
        _, blocks = disk.digests(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if blocks != about.blocks:
        first = next((i for i in range(0, len(blocks), 16) if blocks[i : i + 16] != about.blocks[i : i + 16]), 0) // 16
        return f"{path} is damaged: its block {first} (1 MiB each) is not what was written"
    try:
        present = {(tensor.name, tensor.dtype, tensor.shape) for tensor in read_header(path)}
    except CheckpointError as error:
        return f"{path} is damaged: {error}"
    wanted = {
        (name, DTYPES[entry.dtype], (chunk.stop - chunk.start, *entry.shape[1:]) if entry.shape else ())
        for name, entry in tensors.items()
        for chunk in entry.chunks
        if chunk.file == path.name
    }
    if present != wanted:  # a tensor that the manifest lacks would never be missed
        return f"{path} does not hold what the manifest lists: {min(present ^ wanted)[0]}"
    return ""


def prune(root: Path, keep: int, best: int | None, newest: int) -> None:
    """Remove all but the last `keep` up to `newest`, and the best. Folders that were never finished go as well.

    Those after `newest` are damaged, or the run would have resumed from them: they are not counted and not removed.
    """
    for path in _folders(root):
        if TORN.fullmatch(path.name):
            disk.remove(path, "torn")
    for step in [step for step in steps(root) if step <= newest][:-keep]:
        if step != best:
            disk.remove(root / f"step-{step}", "old")
