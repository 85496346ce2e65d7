"""What a checkpoint of a run says of itself, and whether its files are still what was written."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.cli.text import masked, plain, short, size

SHOWN = ("model", "techniques", "optimizer", "dtype", "seed", "tokens_per_step", "packing")
KINDS = {"optimizer": "optimizer state", "state": "technique state"}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A tensor of which each rank's file holds rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def describe_saved(folder: Path) -> tuple[dict[str, str], list[Whole]]:
    """Facts and tensors. A manifest that is not whole is an error."""
    from treering.train.checkpoints import manifest

    said = manifest.load(folder)
    tensors = [
        Whole(name=n, dtype=e.dtype, shape=e.shape, bytes=math.prod(e.shape) * manifest.WIDTHS[e.dtype])
        for n, e in said.tensors.items()
    ]
    facts = {"step": str(said.step), "ranks": str(said.world)}
    found = said.facts.get("identity")
    identity = found if isinstance(found, dict) else {}
    for name in SHOWN:
        if identity.get(name) is not None:
            facts[name] = short(_told(masked(name, identity[name])), 200)
    facts |= {f"size of {kind}": size(n) for kind, n in _kinds(tensors).most_common()}
    if said.prepared:
        facts["prepared results"] = _prepared(folder, said.prepared)
    facts["files"] = f"{len(said.files)}, {size(sum(file.bytes for file in said.files.values()))}"
    return facts, tensors


def damage(folder: Path, verify: bool) -> Iterator[str]:
    """What is wrong with the files: missing, of another size, or (`verify`: everything is read) of other content."""
    from treering.store import disk
    from treering.train.checkpoints import manifest

    for name, about in manifest.load(folder).files.items():
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file():
                yield f"{plain(str(path))}, which manifest.json names, is missing"
            elif path.stat().st_size != about.bytes:
                yield f"{plain(str(path))} has {path.stat().st_size:,} bytes instead of {about.bytes:,}"
            elif verify and disk.digests(path)[1] != about.blocks:
                yield f"{plain(str(path))} is damaged: its content is not what was written"
        except OSError as error:
            yield f"{plain(str(path))} cannot be read: {error.strerror}"


def _prepared(folder: Path, digests: Mapping[str, str]) -> str:
    """Of the run folder that the checkpoint lies in; by their headers, which are read alone."""
    from treering.plan.prepared import Prepared

    results = folder.absolute().parent.parent / "prepared"
    if not results.is_dir():
        return f"{len(digests)}, not in {plain(str(results))}: a resume makes them again, equal to rounding"
    store = Prepared(results)
    absent = sum(store.find(digest) is None for digest in digests.values())
    missing = f", {absent} missing: a resume makes them again, equal to rounding" if absent else ""
    return f"{len(digests)} in {plain(str(results))}{missing}"


def _kinds(tensors: list[Whole]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for tensor in tensors:
        first, slash, _ = tensor.name.partition("/")
        kinds[KINDS.get(first if slash else "", "weights")] += tensor.bytes
    return kinds


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
