"""One shard of an index: a safetensors file with the rows of some documents, one after the other.

    id_ends [n] I64, tokens [n] I64        where the id of each document ends in `ids`, and how many tokens it has
    scales [modules, n] BF16
    codes.I [n, width]                     of module I; or gaps.I [n, entries] U16 and values.I [n, entries] I8
    ids [bytes] U8                         the ids of the documents, UTF-8

The header has the digest of the data, so that a digest of the header covers every byte. Bytes are a function of the
recipe and the documents: no date, no rank, no name of a machine.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from treering.core.errors import CheckpointError
from treering.sketches import codes
from treering.sketches.recipe import IndexRecipe
from treering.store import disk
from treering.store.layout import DTYPES, header_of
from treering.store.tensor_writer import content_of
from treering.store.untrusted import Header, read_header

FORMAT = "1"
_TORCH = {name: getattr(torch, torch_name) for torch_name, name in DTYPES.items()} | {"U16": torch.uint16}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
REMEDY = "restore it from a copy, or remove the folder and build the index again"
EncodedRows = Mapping[
    str, Mapping[str, Tensor]
]  # tensors of each module, as `IndexRecipe.stored` names them, and its scales


def name_of(number: int) -> str:
    """Return the name of the file of a shard."""
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the JSON of an index lists of a shard. `digest` is that of the header, which has the digest of the data."""

    file: str
    documents: int
    tokens: int
    bytes: int
    digest: str


def layout(recipe: IndexRecipe, documents: int, id_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a shard, in the order of the file: the widest first, so that all are
    aligned."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "id_ends": ("I64", (documents,)),
        "tokens": ("I64", (documents,)),
        "scales": ("BF16", (len(recipe.modules), documents)),
        "ids": ("U8", (id_bytes,)),
    }
    dtypes = {"gaps": "U16", "values": "I8", "codes": _NAMES[codes.DTYPES[recipe.settings.storage]]}
    for number, module in enumerate(recipe.modules):
        for kind, (width, _) in recipe.stored(module).items():
            tensors[f"{kind}.{number}"] = dtypes[kind], (documents, width)
    return dict(sorted(tensors.items(), key=lambda entry: -_TORCH[entry[1][0]].itemsize))


def write(
    path: Path, recipe: IndexRecipe, ids: Sequence[str], tokens: Sequence[int], rows: Sequence[EncodedRows]
) -> None:
    """Write a shard through to the disk, under a name that no file has. `rows` are encoded, in the documents' order."""
    texts = [text.encode() for text in ids]
    plain = {
        "id_ends": torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0),
        "tokens": torch.tensor(tokens, dtype=torch.int64),
        "ids": torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8)[: sum(map(len, texts))],
        "scales": torch.stack([torch.cat([piece[m.name]["scales"] for piece in rows]) for m in recipe.modules]),
    }

    def tensor(name: str) -> Tensor:
        if name in plain:
            return plain[name]
        kind, _, number = name.partition(".")
        pieces = [piece[recipe.modules[int(number)].name][kind] for piece in rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    tensors = layout(recipe, len(ids), sum(map(len, texts)))
    words = xxhash.xxh3_128()
    for name in tensors:  # made twice and never kept, as all of them at once would be a second copy of the shard
        if (content := tensor(name)).numel():
            words.update(content_of(content))
    metadata = {"index": FORMAT, "recipe": recipe.digest, "data": words.hexdigest()}
    entries = ((n, d, shape, torch.Size(shape).numel() * _TORCH[d].itemsize) for n, (d, shape) in tensors.items())
    header, _ = header_of(entries, metadata)
    disk.write(path, _pieces(header, tensors, tensor), "shard", digested=False)


def _pieces(header: bytes, names: Iterable[str], tensor: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for name in names:
        if (content := tensor(name)).numel():
            yield content_of(content)


class ShardReader:
    """The tensors of a shard, mapped into memory: pages are read when their values are used.

    Opening checks the header: names, shapes, sizes and the recipe. `check_data` reads everything.
    """

    def __init__(self, path: Path, recipe: IndexRecipe):
        self.path, self.recipe = path, recipe
        self.headers = {header.name: header for header in read_header(path)}
        self.start, self.digest, self.metadata = _head(path)
        documents = self._length("tokens")
        wanted = layout(recipe, documents, self._length("ids"))
        if {name: (h.dtype, h.shape) for name, h in self.headers.items()} != wanted:
            raise CheckpointError(f"{path} does not have the tensors of a shard of this index; {REMEDY}")
        if self.metadata.get("index") != FORMAT or self.metadata.get("recipe") != recipe.digest:
            raise CheckpointError(f"{path} is a shard of another index; {REMEDY}")
        self.documents = documents
        self._map = np.memmap(path, np.uint8, "c", offset=self.start)

    @property
    def tokens(self) -> Tensor:
        """Tokens of each document, [n] int64."""
        return self.tensor("tokens")

    @property
    def ids(self) -> list[str]:
        """The ids of the documents."""
        content, ends = bytes(self.tensor("ids").numpy()), [0, *self.tensor("id_ends").tolist()]
        try:
            if ends != sorted(ends) or ends[-1] != len(content):
                raise ValueError
            return [content[a:b].decode() for a, b in pairwise(ends)]
        except ValueError:
            raise CheckpointError(f"{self.path} has ids that cannot be read; {REMEDY}") from None

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the file, which shares its memory and is not written to."""
        header: Header = self.headers[name]
        content = torch.from_numpy(self._map[header.start : header.start + header.bytes])
        return content.view(_TORCH[header.dtype]).view(header.shape)

    def check_data(self) -> None:
        """Read everything once, and raise CheckpointError if it has other values than were written."""
        words = xxhash.xxh3_128()
        left = self.start
        for piece in disk.pieces_of(self.path):
            words.update(piece[min(left, len(piece)) :])
            left = max(0, left - len(piece))
        if words.hexdigest() != self.metadata.get("data"):
            raise CheckpointError(f"{self.path} has other values than were written: the file is damaged; {REMEDY}")

    def entry(self) -> ShardEntry:
        """Return what the JSON of the index lists of this shard."""
        return ShardEntry(
            file=self.path.name,
            documents=self.documents,
            tokens=int(self.tokens.sum()),
            bytes=self.path.stat().st_size,
            digest=self.digest,
        )

    def _length(self, name: str) -> int:
        header = self.headers.get(name)
        return header.shape[0] if header is not None and len(header.shape) == 1 else 0


def _head(path: Path) -> tuple[int, str, dict[str, str]]:
    """Return where the data begin, the digest of what is before them, and the metadata; after `read_header`."""
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    return 8 + len(text), xxhash.xxh3_128_hexdigest(length + text), json.loads(text).get("__metadata__", {})
