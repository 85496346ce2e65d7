"""Statistics, the value that a measurement returns: the second moment of each weight's inputs, by its plain name.

N outputs, M inputs, E experts. `inputs` is A: M × M, or E × M × M for stacked experts, float32.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from treering.anatomy.matrices import matrices
from treering.core.errors import CheckpointError
from treering.curvature.entry import Counts, Entry
from treering.curvature.factors import GradientFactors

if TYPE_CHECKING:
    from treering.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Ring:
    """One measurement: its text, how many tokens of it, and when, as the caller gives them."""

    name: str
    tokens: int
    data: str = ""  # digest of the tokens
    date: str = ""


class Statistics(Mapping[str, Mapping[str, Tensor]]):
    """statistics["model.layers.0.mlp.up_proj.weight"] is {"inputs": A, "tokens": count}, read when asked for.

    A is the sum, over `rings`, of each one's mean of a aᵀ.
    """

    def __init__(
        self,
        *,
        model_type: str,
        entries: Mapping[str, Entry],
        rings: tuple[Ring, ...],
        read: Callable[[Entry], Tensor],
        where: str = "memory",
        gradients: GradientFactors | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ):
        self.fingerprints = dict(fingerprints or {})  # of the weights that were measured last; see `fingerprint`
        self.gradients = gradients  # what was measured of gradients besides; None: nothing
        self.model_type, self.entries, self.rings, self.where = model_type, dict(entries), rings, where
        self._read = read
        self._last: tuple[str, Tensor] | None = None  # q, k and v are read one after the other

    def __getitem__(self, weight: str) -> Mapping[str, Tensor]:
        entry = self.entries[weight]
        if self._last is None or self._last[0] != entry.key:
            self._last = None  # two at a time would need twice the memory
            self._last = entry.key, self._read(entry)
        return {"inputs": self._last[1], "tokens": torch.tensor(entry.tokens)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, weight: object) -> bool:
        return weight in self.entries  # the default of Mapping would read the tensor

    @property
    def digest(self) -> str:
        """A digest of the values and token counts; not of the names and dates of rings."""
        values = [[weight, e.digest, e.tokens] for weight, e in sorted(self.entries.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.model_type, values]).encode())

    @property
    def tensors(self) -> dict[str, Entry]:
        """Each tensor once, by its key."""
        return {entry.key: entry for entry in self.entries.values()}

    @property
    def files(self) -> set[str]:
        """The files of data, without their folder."""
        pieces = () if self.gradients is None else self.gradients.entries.values()
        return {entry.file for entry in (*self.entries.values(), *pieces)}

    @property
    def bytes(self) -> int:
        pieces = {} if self.gradients is None else self.gradients.entries
        return 4 * sum(torch.Size(entry.shape).numel() for entry in {**pieces, **self.tensors}.values())

    def check(self, anatomy: "Anatomy") -> None:
        """Raise a CheckpointError where these are statistics of another model: its directions mean nothing here."""
        wanted = sizes(anatomy)
        for weight, entry in self.entries.items():
            if wanted.get(weight) != entry.shape:
                has = f"whose inputs are {wanted[weight]}" if weight in wanted else "which this model does not have"
                raise CheckpointError(
                    f"{self.where} was measured on another model ({self.model_type}): it has {entry.shape} for "
                    f"{weight}, {has} here; measure this one: treering measure MODEL --data FILE --to DIR"
                )

    def described(self) -> list[dict[str, object]]:
        """Return the measurements as plain data, for reports and manifests."""
        return [asdict(ring) for ring in self.rings]


def sizes(anatomy: "Anatomy") -> dict[str, tuple[int, ...]]:
    """Return the shape of A by weight, for every linear layer in the blocks and all stacked experts, block by block."""
    inside = [matrix for matrix in matrices(anatomy) if matrix.block is not None]
    return {m.weight: m.input_moment for m in sorted(inside, key=lambda m: (m.block, 0))}


def in_memory(
    model_type: str, tensors: Mapping[str, Tensor], owners: Mapping[str, str], tokens: Mapping[str, Counts],
    rings: tuple[Ring, ...], fingerprints: Mapping[str, str] | None = None,
) -> Statistics:  # fmt: skip
    """Return statistics of tensors in memory. `owners`: weight -> the weight under whose name its tensor is."""
    from treering.store.tensor_writer import content_of

    digests = {key: xxhash.xxh3_128_hexdigest(content_of(tensor)) for key, tensor in tensors.items()}
    entries = {
        weight: Entry(key=key, tokens=tokens[key], shape=tuple(tensors[key].shape), digest=digests[key])
        for weight, key in owners.items()
    }
    return Statistics(
        model_type=model_type,
        entries=entries,
        rings=rings,
        read=lambda entry: tensors[entry.key],
        fingerprints=fingerprints,
    )
