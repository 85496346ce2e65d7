"""Tokenised documents as a value, built from the sources of the configuration."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from treering.core.errors import DataError
from treering.data import cache
from treering.data.config import Data, Format
from treering.data.document import Document
from treering.data.encoding_recipe import recipe
from treering.data.formats import detect
from treering.data.sources import reading as sources
from treering.data.sources.records import SampleError
from treering.data.work import EncodingJob, batches, encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Which = Literal["train", "eval"]
_DETECT = 100  # records from which the format is detected
_NAMED = 5  # skipped samples of each kind that the report names


@dataclass(frozen=True, kw_only=True)
class Report:
    """Counts of records and documents. `skipped` and `named` are by kind of error."""

    format: Format
    template: str
    read: int
    kept: int  # documents; a cut text gives several
    truncated: int
    dropped: int  # too long
    endless: int  # documents with an assistant turn that has no end-of-turn token to learn
    unprompted: int  # documents with one that does not begin with the full generation prompt
    thoughts: int  # thoughts of earlier turns that the template leaves out
    without_tools: int  # documents with tools that the template does not write
    skipped: Mapping[str, int] = field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def notes(self) -> Mapping[str, int]:
        """Facts about the kept documents that a user has to know, with their counts."""
        counts = {
            "truncated": self.truncated,
            "too long, dropped": self.dropped,
            "without an end of turn": self.endless,
            "that begin with less than the template's generation prompt": self.unprompted,
            "thoughts of earlier turns left out by the template": self.thoughts,
            "with tools that the template does not write": self.without_tools,
        }
        return {note: count for note, count in counts.items() if count}


class Examples:
    """Documents by index, read through memory maps."""

    def __init__(self, arrays: cache.Arrays, manifest: Mapping[str, Any], *, keep: object = None):
        self._ids, self._mask = arrays["ids"], arrays["mask"]
        self._offsets = np.asarray(arrays["offsets"])
        self._places = {name: arrays[name] for name in ("files", "rows", "pieces")}
        self._files = tuple(manifest["files"])
        self._keep = keep  # the temporary folder, if there is no cache
        self._trains: NDArray[np.bool_] | None = None  # None: every document
        self.key: str = manifest["key"]  # a digest of all inputs of the tokens
        self.digest: str = manifest["digest"]  # of the tokens: equal for equal tokens, whatever their inputs
        self.report = Report(**manifest["report"])
        self.lengths: NDArray[np.int32] = np.diff(self._offsets).astype(np.int32)
        self.trained: NDArray[np.int32] = np.asarray(arrays["trained"]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> Document:
        """Return document `i`."""
        begin, end = self._offsets[i], self._offsets[i + 1]
        mask = self._mask[begin:end]
        if self._trains is not None and not self._trains[i]:
            mask = np.zeros_like(mask)
        return Document(ids=self._ids[begin:end], mask=mask, sample_id=self.sample_id(i))

    def only(self, kept: NDArray[np.bool_]) -> "Examples":
        """Return the same documents in the same places, of which those that are not `kept` train nothing.

        Steps, batches and the learning rate of each step stay as they are, so two runs differ in these documents alone.
        """
        if kept.shape != (len(self),) or kept.dtype != np.bool_ or not kept.any():
            raise DataError(f"which documents train has to be true or false for each of {len(self)}, and true for one")
        other = copy.copy(self)
        other._trains = kept
        other.trained = np.where(kept, self.trained, 0).astype(np.int32)
        other.digest = f"{self.digest} only {xxhash.xxh3_128_hexdigest(kept.tobytes())}"
        return other

    def tokens(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the tokens of all documents, one behind the other, and the offsets [documents + 1] of each."""
        return self._ids, self._offsets

    def sample_id(self, i: int) -> str:
        """Return the place of a document, such as `train.jsonl:17`; a piece of a cut text is `book.txt:1#3`."""
        piece = int(self._places["pieces"][i])
        place = f"{self._files[self._places['files'][i]]}:{self._places['rows'][i]}"
        return f"{place}#{piece}" if piece else place


def build(
    config: Data,
    tokenizer: "PreTrainedTokenizerBase",
    which: Which = "train",
    progress: Callable[[int], None] | None = None,
) -> Examples:
    """Return the documents of a set: read, check, tokenise and mask them, or open their cache.

    `progress` is called with the number of records read so far. Call `build` on one rank first, outside any collective:
    the other ranks then open the cache.
    """
    split = config.eval_split if which == "eval" and config.eval is not None else config.split
    files = sources.open_sources(config.sources(which), split)
    first = next(batches(itertools.islice(sources.read(files, config, which), _DETECT), _DETECT), [])
    format = detect(first, config)
    job = EncodingJob(plan=recipe(tokenizer, config, format), format=format, config=config)
    key = _key(files, job, which)
    if config.cache is None:
        temporary = cache.PrivateFolder()
        folder = temporary.path / key
    else:
        temporary = None
        folder = Path(config.cache).expanduser() / key
        if (cached := cache.read(folder)) is not None:
            cache.sweep(folder)
            return Examples(*cached)
        cache.remove(folder)
    _write(folder, key, files, job, which, progress)
    cached = cache.read(folder)
    if cached is None:
        raise DataError(f"data.cache: {folder} was written but cannot be read; the disk may be full or damaged")
    return Examples(*cached, keep=temporary)


def _write(
    folder: Path,
    key: str,
    files: tuple[sources.SourceFile, ...],
    job: EncodingJob,
    which: Which,
    progress: Callable[[int], None] | None,
) -> None:
    names = ("read", "kept", "truncated", "dropped", "endless", "unprompted", "thoughts", "without_tools")
    counts = dict.fromkeys(names, 0)
    skipped: dict[str, int] = {}
    named: dict[str, list[str]] = {}
    writer = cache.CacheWriter(folder)
    try:
        for result in encoded(sources.read(files, job.config, which), job, job.config.workers):
            counts["read"] += 1
            if isinstance(result, SampleError):
                _skip(result, job.config, skipped, named)
                continue
            counts["dropped"] += not result
            counts["kept"] += len(result)
            for document in result[:1]:  # all pieces of a cut text have the same flags
                counts["truncated"] += document.truncated
                counts["endless"] += document.endless
                counts["unprompted"] += document.unprompted
                counts["thoughts"] += document.thoughts
                counts["without_tools"] += document.without_tools
            writer.add(result)
            if progress is not None and counts["read"] % 256 == 0:
                progress(counts["read"])
        if not counts["kept"]:
            reasons = "; ".join(f"{n} × {kind} ({named[kind][0]})" for kind, n in skipped.items())
            raise DataError(f"{files[0].label}: no sample is left: {reasons or 'all are longer than max_length'}")
        first_errors = {kind: tuple(errors) for kind, errors in named.items()}
        report = Report(
            **counts, format=job.format, template=job.plan.template_name, skipped=skipped, named=first_errors
        )
        writer.publish({"key": key, "files": short_names([file.label for file in files]), "report": asdict(report)})
    except BaseException:
        writer.discard()
        raise
    if progress is not None:
        progress(counts["read"])


def _skip(error: SampleError, config: Data, skipped: dict[str, int], named: dict[str, list[str]]) -> None:
    allowed = config.skip_untrained if error.kind == "untrained" else config.skip_bad
    if not allowed or error.kind == "too long":
        raise error
    skipped[error.kind] = skipped.get(error.kind, 0) + 1
    if len(named.setdefault(error.kind, [])) < _NAMED:
        named[error.kind].append(str(error))


def short_names(labels: list[str]) -> list[str]:
    """Return how sample ids name the files: without folders if that is unique, otherwise as they are labelled."""
    names = [Path(label).name or label for label in labels]
    return names if len(set(names)) == len(names) else labels


def _key(files: tuple[sources.SourceFile, ...], job: EncodingJob, which: Which) -> str:
    config = job.config
    options = {
        "columns": dict(config.columns),
        "ignore": config.ignore,
        "eval_fraction": config.eval_fraction,
        "which": which if config.eval_fraction else "",
        "skip": [config.skip_bad, config.skip_untrained],
        "line_limit": config.line_limit,
        "format": job.format,
    }
    parts = [sources.digest(files), job.plan.digest, json.dumps(options, sort_keys=True), _code()]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


@lru_cache
def _code() -> str:
    """Return a digest of this package's source and of the versions of the libraries that tokenise and render."""
    state = xxhash.xxh3_128(f"{version('tokenizers')} {version('transformers')}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()
