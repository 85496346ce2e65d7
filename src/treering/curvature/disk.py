"""Statistics in a folder: safetensors files, and statistics.json, which describes them and is written last.

Files of data have names that are never used again, and the JSON that names them replaces the former one by
one rename: a writer that is killed leaves the former statistics complete.
"""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treering.core.collectives import is_first, together
from treering.core.errors import CheckpointError, TreeringError
from treering.curvature import factors_layout
from treering.curvature.entry import Counts, Entry
from treering.curvature.statistics import Ring, Statistics
from treering.store import disk
from treering.store.tensor_writer import LIMIT, TensorWriter, content_digest
from treering.store.untrusted import basename, in_folder, read_header, read_json, visible

FORMATS = (1, 2)  # 2: with gradients
NAME = "statistics.json"
_FILES = re.compile(r"statistics(\.json(\.tmp)?|-[0-9a-f]{8}(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?)")


def open_folder(folder: str | Path) -> Statistics:
    """Return the statistics of a folder; a tensor is read, and compared with its digest, when it is asked for."""
    folder = Path(folder)
    path = in_folder(folder, NAME) if folder.is_dir() else None
    if path is None:
        raise CheckpointError(f"{folder} holds no {NAME}; make one: treering measure MODEL --data FILE --to {folder}")
    description = read_json(path)
    if description.get("format") not in FORMATS:
        raise CheckpointError(
            f"{path} has the format {str(description.get('format'))[:40]!r}, and this version reads 1 and 2; "
            "measure again"
        )
    try:
        rings = tuple(Ring(**_checked(ring, Ring)) for ring in description["rings"])
        entries = {str(weight): Entry(**_entry(description, entry)) for weight, entry in description["weights"].items()}
        model_type = str(description["model_type"])
        pieces = factors_layout.entries(description)
        gradients = factors_layout.factors(description, pieces, lambda entry: _read(folder, entry))
        fingerprints = {str(weight): str(text) for weight, text in description.get("fingerprints", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = visible(str(error))[:300]
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {reason}); measure again") from None
    _check_files(folder, path, {**{entry.key: entry for entry in entries.values()}, **pieces})
    return Statistics(
        model_type=model_type,
        entries=entries,
        rings=rings,
        read=lambda entry: _read(folder, entry),
        where=str(folder),
        gradients=gradients,
        fingerprints=fingerprints,
    )


def refuse_foreign(folder: Path) -> None:
    """Raise CheckpointError if the folder holds anything but statistics."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give statistics a folder of their own")
    strange = [entry.name for entry in folder.iterdir() if not _FILES.fullmatch(entry.name)] if folder.exists() else []
    if strange:
        raise CheckpointError(f"{folder} holds {sorted(strange)[0]}; give statistics a folder of their own")


def copy_folder(folder: Path, to: Path) -> None:
    """Copy statistics to a new folder, file by file, the JSON last."""
    statistics = open_folder(folder)
    to.mkdir()
    for name in [*sorted(statistics.files), NAME]:
        shutil.copyfile(folder / name, to / name)
        disk.sync(to / name)
    disk.sync(to)
    open_folder(to)


class StatisticsWriter:
    """The writer that `writing` yields. Every rank calls every method; rank 0 writes."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], limit: int):
        self.folder, self.token = folder, uuid.uuid4().hex[:8]
        self.gradients: Mapping[str, Any] | None = None  # how they are described, set before the end
        self.fingerprints: Mapping[str, str] = {}  # likewise
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        self.writer = TensorWriter(meta, file=f"statistics-{self.token}.safetensors", limit=limit)
        self.counts: dict[str, Counts] = {}

    def add(self, key: str, make: Callable[[], tuple[Tensor, Counts]]) -> None:
        """Write an announced tensor, each once and in any order. `make` is called on the rank that writes."""

        def work() -> None:
            tensor, self.counts[key] = make()
            self.writer.add(key, tensor)

        self.first(work)

    def first(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0; its error is raised on every rank."""

        def problem_of_first() -> str:
            try:
                if is_first():
                    work()
                return ""
            except TreeringError as error:
                return str(error)

        if problem := together(problem_of_first, f"writing {self.folder}")[0]:
            raise CheckpointError(problem)

    def open(self) -> None:
        """Create the folder and the files of data."""
        refuse_foreign(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer.open(self.folder)

    def publish(
        self, model_type: str, owners: Mapping[str, str], rings: Sequence[Ring], kept: Mapping[str, Any]
    ) -> None:
        """Write the JSON, after which the folder is the new one, and remove the former files.

        Args:
            kept: tensors that are in the folder already, as the former JSON describes them.
        """
        self.writer.close()
        self.writer.check()
        tensors = {
            key: {
                "file": place.file,
                "digest": self.writer.digests[key],
                "shape": list(self.writer.tensors[key].shape),
                "tokens": self.counts[key],
            }
            for key, place in self.writer.places.items()
        }
        description: dict[str, Any] = {
            "format": 1 if self.gradients is None else 2,
            "model_type": model_type,
            "rings": [asdict(ring) for ring in rings],
            "weights": dict(owners),
            "tensors": {**kept, **tensors},
        }
        if self.fingerprints:
            description["fingerprints"] = dict(self.fingerprints)
        if self.gradients is not None:
            description["gradients"] = self.gradients
        disk.replace(self.folder / NAME, json.dumps(description, indent=1).encode())
        used = {tensor["file"] for tensor in kept.values()}
        self.sweep(lambda name: self.token not in name and name not in used)

    def sweep(self, old: Callable[[str], bool]) -> None:
        """Remove files of data that are not named in the JSON, if `old` of their name."""
        for path in list(self.folder.iterdir()):
            if path.name != NAME and _FILES.fullmatch(path.name) and old(path.name):
                path.unlink(missing_ok=True)


@contextmanager
def writing(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    model_type: str,
    owners: Mapping[str, str],
    rings: Sequence[Ring],
    limit: int = LIMIT,
    kept: Mapping[str, Any] | None = None,
) -> Iterator[StatisticsWriter]:
    """Write a folder, tensor by tensor: `shapes` announces them by key, `owners` names the key of each weight.

    Args:
        kept: tensors that are in the folder already and stay, as its JSON describes them.
    """
    writer = StatisticsWriter(folder, shapes, limit)
    writer.first(writer.open)
    try:
        yield writer
        writer.first(lambda: writer.publish(model_type, owners, rings, kept or {}))
    except BaseException:
        if is_first():
            writer.sweep(lambda name: writer.token in name)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _checked(value: Mapping[str, Any], kind: type) -> dict[str, Any]:
    fields = {name: value[name] for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    for name, content in fields.items():
        if not (_is_count(content) if name == "tokens" else isinstance(content, str)):
            raise ValueError(f"{name} is {str(content)[:40]!r}")
    return fields


def _entry(description: Mapping[str, Any], key: Any) -> dict[str, Any]:
    tensor = description["tensors"][str(key)]
    tokens, shape = tensor["tokens"], tuple(tensor["shape"])
    counts = tokens if isinstance(tokens, list) else [tokens]
    square = len(shape) in (2, 3) and all(_is_count(n) for n in shape) and shape[-1] == shape[-2]
    fits = len(counts) == shape[0] if isinstance(tokens, list) else len(shape) == 2
    texts = all(isinstance(tensor[name], str) for name in ("digest", "file"))
    if not (square and fits and all(map(_is_count, counts)) and texts):
        raise ValueError(f"the entry of {str(key)[:80]!r}")
    checked: Counts = tuple(tokens) if isinstance(tokens, list) else tokens
    return {"key": str(key), "tokens": checked, "shape": shape, "digest": tensor["digest"], "file": tensor["file"]}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check_files(folder: Path, path: Path, entries: Mapping[str, Entry]) -> None:
    """Check that every tensor is where the JSON lists it, before a run of hours needs it."""
    headers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for entry in entries.values():
        if entry.file not in headers:
            file = in_folder(folder, basename(entry.file, path))
            if file is None:
                raise CheckpointError(f"{folder} lacks {entry.file}, which its {NAME} names; measure again")
            headers[entry.file] = {t.name: (t.dtype, t.shape) for t in read_header(file)}
        if headers[entry.file].get(entry.key) != ("F32", entry.shape):
            raise CheckpointError(
                f"{folder / entry.file} does not hold what {NAME} lists for {visible(entry.key)}; measure again"
            )


def _read(folder: Path, entry: Entry) -> Tensor:
    path = folder / entry.file
    try:
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(entry.key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read any more: {error}") from None
    if content_digest(tensor) != entry.digest:
        raise CheckpointError(
            f"{path}: {entry.key} has other values than were written; the file is damaged, measure again"
        )
    return tensor
