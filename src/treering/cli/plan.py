"""`treering plan`: what a configuration would do, from shapes alone, for any number of ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from treering.cli.options import ConfigFile, Settings, load

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig

NAME = "plan"


def command(
    file: ConfigFile,
    settings: Settings = None,
    ranks: Annotated[int, typer.Option(min=1, max=100_000, help="Plan for so many ranks; none is started.")] = 1,
) -> None:
    """Show what would happen: order, memory, messages. Reads no weights, trains nothing."""
    config = load(file, settings)
    from treering.cli.console import say

    say(explanation(config, ranks))


def explanation(config: "RunConfig", ranks: int) -> str:
    """`explain()` of `config` as rank 0 of `ranks` would see it."""
    from treering.cli.train import job_of
    from treering.plan import draft
    from treering.plan.explain import explain
    from treering.topology import mesh
    from treering.train.rings import find

    with _pretend(ranks):
        laid_out = mesh(**asdict(config.mesh), device="cpu")
        plan = draft(
            config.model.path,
            config.techniques.chosen(),
            mesh=laid_out,
            dtype=config.model.dtype,
            seed=config.seed,
            dropout=config.model.dropout,
            statistics=find(job_of(config)),
            roles=config.model.roles,
            weights=False,
        )
        return explain(plan)


@contextmanager
def _pretend(ranks: int) -> Iterator[None]:
    """A process group of `ranks` whose messages go nowhere: shapes need no partners."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    launched = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.update(launched)
