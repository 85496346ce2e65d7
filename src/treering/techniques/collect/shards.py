"""The shards of a collection: rows of all ranks, in an order that depends on steps and names alone."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from treering.core.collectives import is_first, together
from treering.core.topology import sequence_place
from treering.curvature.factors import GradientFactors
from treering.curvature.targets import Target
from treering.sketches import IndexRecipe, ModuleMap, recipe_of, writing
from treering.sketches.gradient_rows import maps_of
from treering.sketches.listing import NAME
from treering.sketches.shards import EncodedRows
from treering.sketches.writer import IndexWriter
from treering.store.tensor_writer import content_of
from treering.store.untrusted import in_folder
from treering.technique import Site

if TYPE_CHECKING:
    from treering.techniques.collect.settings import CollectSettings


Waiting = tuple[list[str], list[int], EncodedRows]  # ids, tokens, rows


class CollectedShards:
    """Rows that wait, and the shards that they are written to."""

    def __init__(self, maps: dict[str, ModuleMap], recipe: IndexRecipe, writer: IndexWriter, site: Site, count: int):
        self.maps, self.recipe, self.writer, self.count = maps, recipe, writer, count
        self.keeps = not any(sequence_place(site.mesh))  # of ranks that share rows, one
        self._waiting: list[Waiting] = []
        self._stack = ExitStack()

    @classmethod
    def of(
        cls, config: "CollectSettings", targets: Mapping[str, Target], factors: GradientFactors | None, site: Site,
        device: torch.device, count: int,
    ) -> "CollectedShards":  # fmt: skip
        """Open the folder with its first `count` shards; later ones are of steps that are taken again. A collective."""
        settings = config.sketch()
        maps = {name: one.to(device) for name, one in maps_of(settings, targets, factors)[0].items()}
        digests = {} if factors is None else {"statistics": factors.digest, "basis": factors.digest}
        about, model = {"collected": "in training"}, "" if factors is None else factors.model
        recipe = recipe_of(maps.values(), settings, model=model, about=about, cover=config.cover, **digests)
        published = in_folder(Path(config.to), NAME) is not None if Path(config.to).is_dir() else False
        stack = ExitStack()
        writer = stack.enter_context(writing(config.to, recipe, append=published))
        writer.drop(count)
        shards = cls(maps, recipe, writer, site, count)
        shards._stack = stack
        return shards

    def keep(self, ids: Sequence[str], tokens: Sequence[int], rows: EncodedRows) -> None:
        """Keep the rows of some documents until the next `flush`."""
        if self.keeps and ids:
            self._waiting.append((list(ids), list(tokens), rows))

    def flush(self) -> int:
        """Write what waits on all ranks to one shard. Returns how many shards there are. A collective."""
        every = [_unpacked(part) for part in _gathered_on_first(_packed(self._waiting))]
        self._waiting = []
        pieces = [one for part in every for one in part]  # none on other ranks

        def write() -> int:
            if pieces:
                self._write(pieces)
            return int(bool(pieces))

        self.count += together(write, "writing the collected rows")[0]
        return self.count

    def _write(self, pieces: list[Waiting]) -> None:
        order = sorted(
            ((_place(name), number, row) for number, (ids, _, _) in enumerate(pieces) for row, name in enumerate(ids))
        )
        with self.writer.shard(self.count) as shard:
            for _, number, row in order:
                ids, tokens, rows = pieces[number]
                one = {module: {n: t[row : row + 1] for n, t in tensors.items()} for module, tensors in rows.items()}
                shard.add_encoded([ids[row]], [tokens[row]], one)

    def publish(self) -> None:
        """List all shards in the index. A collective."""
        if self.count:
            self.writer.publish(self.count)
        self._stack.close()


def _place(name: str) -> tuple[int, str]:
    """Return the step of a row, and its sample: rows are in this order, whichever rank computed them."""
    sample, _, step = name.rpartition("@")
    return int(step), sample


def _packed(waiting: Sequence[Waiting]) -> list[Any]:
    """Return rows as bytes: an object that is sent to another rank must not contain tensors, which would be pickled."""
    return [
        (
            ids,
            tokens,
            {m: {n: (t.dtype, tuple(t.shape), bytes(content_of(t))) for n, t in x.items()} for m, x in rows.items()},
        )
        for ids, tokens, rows in waiting
    ]


def _unpacked(packed: Sequence[Any]) -> list[Waiting]:
    def tensor(dtype: torch.dtype, shape: tuple[int, ...], content: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    return [
        (ids, tokens, {m: {n: tensor(*one) for n, one in x.items()} for m, x in rows.items()})
        for ids, tokens, rows in packed
    ]


def _gathered_on_first(value: list[Any]) -> list[list[Any]]:
    """Return the values of all ranks on rank 0, and nothing on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(value, values, dst=0)
    return values or []
