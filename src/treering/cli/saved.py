"""The description of a checkpoint, and a check that its files are as they were written."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.cli.text import masked, plain, short, size
from treering.core.settings import with_current_names

SHOWN = ("model", "techniques", "optimizer", "dtype", "seed", "tokens_per_step", "packing")
KINDS = {"optimizer": "optimizer state", "state": "technique state"}


@dataclass(frozen=True, kw_only=True)
class TensorDescription:
    """A complete tensor of a checkpoint, of which each rank's file has rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


def describe_saved(folder: Path) -> tuple[dict[str, str], list[TensorDescription]]:
    """Return facts and tensors of a checkpoint. A damaged manifest is an error."""
    from treering.train.checkpoints import manifest

    description = manifest.load(folder)
    tensors = [
        TensorDescription(name=n, dtype=e.dtype, shape=e.shape, bytes=math.prod(e.shape) * manifest.WIDTHS[e.dtype])
        for n, e in description.tensors.items()
    ]
    facts = {"step": str(description.step), "ranks": str(description.world)}
    facts_of_run = description.facts.get("identity")
    identity = dict(facts_of_run) if isinstance(facts_of_run, dict) else {}
    if isinstance(identity.get("techniques"), list):
        identity["techniques"] = [_with_current_names(str(text)) for text in identity["techniques"]]
    for name in SHOWN:
        if identity.get(name) is not None:
            facts[name] = short(_joined(masked(name, identity[name])), 200)
    facts |= {f"size of {kind}": size(n) for kind, n in _kinds(tensors).most_common()}
    if description.prepared:
        facts["prepared results"] = _prepared(folder, description.prepared)
    facts["files"] = f"{len(description.files)}, {size(sum(file.bytes for file in description.files.values()))}"
    return facts, tensors


def _with_current_names(text: str) -> str:
    """Return a technique's settings, written by any version, with the names of this one."""
    from treering.techniques import TECHNIQUES

    for technique in TECHNIQUES.values():
        text = with_current_names(technique, text)
    return text


def damage(folder: Path, verify: bool) -> Iterator[str]:
    """Yield what is wrong with the files: missing, of another size, or, with `verify`, of other content."""
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
    """Return how many prepared results the run folder of the checkpoint has and lacks, from their headers."""
    from treering.plan.prepared import Prepared

    results = folder.absolute().parent.parent / "prepared"
    if not results.is_dir():
        return f"{len(digests)}, not in {plain(str(results))}: a resume computes them again, equal to rounding"
    store = Prepared(results)
    absent = sum(store.find(digest) is None for digest in digests.values())
    missing = f", {absent} missing: a resume computes them again, equal to rounding" if absent else ""
    return f"{len(digests)} in {plain(str(results))}{missing}"


def _kinds(tensors: list[TensorDescription]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for tensor in tensors:
        first, slash, _ = tensor.name.partition("/")
        kinds[KINDS.get(first if slash else "", "weights")] += tensor.bytes
    return kinds


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
