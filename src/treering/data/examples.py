"""Tokenised documents as a value, and how they are made from what the user wrote."""

import itertools
import json
import tempfile
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
from treering.data.encode import recipe
from treering.data.formats import detect
from treering.data.sources import reading as sources
from treering.data.sources.records import SampleError
from treering.data.work import Job, encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Which = Literal["train", "eval"]
_LOOK = 100  # records looked at to detect the format
_EXAMPLES = 5  # skipped samples that the report names, of each kind


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the records. `skipped` and `named` are by reason."""

    format: Format
    template: str
    read: int
    kept: int  # documents; a cut text gives several
    truncated: int
    dropped: int  # too long
    endless: int  # documents with an assistant turn that has no end-of-turn token to learn
    unprompted: int  # documents with one that does not begin with the whole generation prompt
    thoughts: int  # thoughts of earlier turns, which the template leaves out
    without_tools: int  # documents with tools that the template does not write
    skipped: Mapping[str, int] = field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def notes(self) -> Mapping[str, int]:
        """What a user has to know of the kept documents, with how often it occurs."""
        counts = {
            "truncated": self.truncated,
            "too long, dropped": self.dropped,
            "without an end of turn": self.endless,
            "that begin with less than the template's generation prompt": self.unprompted,
            "thoughts of earlier turns left out by the template": self.thoughts,
            "with tools that the template does not write": self.without_tools,
        }
        return {what: count for what, count in counts.items() if count}


@dataclass(frozen=True, kw_only=True)
class Document:
    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]  # True: trained; never the first token
    sample_id: str


class Examples:
    """Documents by index. Large arrays stay on disk."""

    def __init__(self, arrays: cache.Arrays, manifest: Mapping[str, Any], *, keep: object = None):
        self._ids, self._mask = arrays["ids"], arrays["mask"]
        self._offsets = np.asarray(arrays["offsets"])
        self._places = {name: arrays[name] for name in ("files", "rows", "pieces")}
        self._files = tuple(manifest["files"])
        self._keep = keep  # the temporary folder, if there is no cache
        self.key: str = manifest["key"]  # of everything that the tokens were made from
        self.digest: str = manifest["digest"]  # of the tokens: another way to the same ones is the same data
        self.report = Report(**manifest["report"])
        self.lengths: NDArray[np.int32] = np.diff(self._offsets).astype(np.int32)
        self.trained: NDArray[np.int32] = np.asarray(arrays["trained"]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> Document:
        begin, end = self._offsets[i], self._offsets[i + 1]
        return Document(ids=self._ids[begin:end], mask=self._mask[begin:end], sample_id=self.sample_id(i))

    def sample_id(self, i: int) -> str:
        """As in `train.jsonl:17`; a piece of a cut text is `book.txt:1#3`."""
        piece = int(self._places["pieces"][i])
        where = f"{self._files[self._places['files'][i]]}:{self._places['rows'][i]}"
        return f"{where}#{piece}" if piece else where


def build(
    config: Data,
    tokenizer: "PreTrainedTokenizerBase",
    which: Which = "train",
    progress: Callable[[int], None] | None = None,
) -> Examples:
    """Read, check, tokenise, mask; or open the cache of the same. `progress` gets the number of records so far.

    Call it on one rank first, outside any collective: the others then find the cache.
    """
    split = config.eval_split if which == "eval" and config.eval is not None else config.split
    files = sources.open_sources(config.sources(which), split)
    format = detect(list(itertools.islice(sources.read(files, config, which), _LOOK)), config)
    job = Job(plan=recipe(tokenizer, config, format), format=format, config=config)
    key = _key(files, job, which)
    if config.cache is None:
        holder = tempfile.TemporaryDirectory(prefix="treering-tokens-")
        folder = Path(holder.name) / key
    else:
        holder = None
        folder = Path(config.cache).expanduser() / key
        if (found := cache.read(folder)) is not None:
            return Examples(*found)
        cache.remove(folder)
    _write(folder, key, files, job, which, progress)
    found = cache.read(folder)
    if found is None:
        raise DataError(f"data.cache: what was written to {folder} does not read back; the disk may be full or damaged")
    return Examples(*found, keep=holder)


def _write(
    folder: Path,
    key: str,
    files: tuple[sources.File, ...],
    job: Job,
    which: Which,
    progress: Callable[[int], None] | None,
) -> None:
    names = ("read", "kept", "truncated", "dropped", "endless", "unprompted", "thoughts", "without_tools")
    count = dict.fromkeys(names, 0)
    skipped: dict[str, int] = {}
    named: dict[str, list[str]] = {}
    writer = cache.CacheWriter(folder)
    try:
        for result in encoded(sources.read(files, job.config, which), job, job.config.workers):
            count["read"] += 1
            if isinstance(result, SampleError):
                _skip(result, job.config, skipped, named)
                continue
            count["dropped"] += not result
            count["kept"] += len(result)
            for document in result[:1]:  # the pieces of a cut text are alike
                count["truncated"] += document.truncated
                count["endless"] += document.endless
                count["unprompted"] += document.unprompted
                count["thoughts"] += document.thoughts
                count["without_tools"] += document.without_tools
            writer.add(result)
            if progress is not None and count["read"] % 256 == 0:
                progress(count["read"])
        if not count["kept"]:
            why = "; ".join(f"{n} × {kind} ({named[kind][0]})" for kind, n in skipped.items())
            raise DataError(f"{files[0].label}: no sample is left: {why or 'all are longer than max_length'}")
        firsts = {kind: tuple(errors) for kind, errors in named.items()}
        report = Report(**count, format=job.format, template=job.plan.template_name, skipped=skipped, named=firsts)
        writer.publish({"key": key, "files": _short([file.label for file in files]), "report": asdict(report)})
    except BaseException:
        writer.discard()
        raise
    if progress is not None:
        progress(count["read"])


def _skip(error: SampleError, config: Data, skipped: dict[str, int], named: dict[str, list[str]]) -> None:
    allowed = config.skip_untrained if error.kind == "untrained" else config.skip_bad
    if not allowed or error.kind == "too long":
        raise error
    skipped[error.kind] = skipped.get(error.kind, 0) + 1
    if len(named.setdefault(error.kind, [])) < _EXAMPLES:
        named[error.kind].append(str(error))


def _short(labels: list[str]) -> list[str]:
    """File names alone, where they are enough to tell the files apart."""
    names = [Path(label).name or label for label in labels]
    return names if len(set(names)) == len(names) else labels


def _key(files: tuple[sources.File, ...], job: Job, which: Which) -> str:
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
    """Of this package's own source and of the two libraries that render and tokenise: nobody has to count versions."""
    state = xxhash.xxh3_128(f"{version('tokenizers')} {version('transformers')}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()
