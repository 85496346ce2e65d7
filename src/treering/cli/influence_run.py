"""What `treering influence build` and `query` do with a run: open it, index its data, score it."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treering.influence.run_index import RunIndex
    from treering.influence.scores import ScoreTable
    from treering.sketches.settings import SketchSettings
    from treering.train.config import Job


def opened(job: "Job", step: int | None) -> "RunIndex":
    """Return the run at a checkpoint, in a form whose backward fits wherever its training did."""
    from treering.influence.run_index import RunIndex
    from treering.technique import Technique
    from treering.techniques import Recompute, Shard, TiledLoss

    helping: list[Technique] = [Recompute(), TiledLoss()]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        helping.append(Shard())
    return RunIndex.open(job, step=step, helping=helping)


def build_index(job: "Job", settings: "SketchSettings", tokens: int, step: int | None) -> None:
    """Build the index of a run, and print what is in it and how it does on a probe."""
    from treering.cli.console import console, say
    from treering.cli.text import count, size
    from treering.core.collectives import is_first

    of_run = opened(job, step)
    if is_first():
        say(f"rows of {count(len(of_run.examples), 'document')} into {of_run.folder}")
    with console(stderr=True).status("measuring") as status:
        show = lambda what, done, of: status.update(f"{what}: batch {done:,} of {of:,}")  # noqa: E731
        index = of_run.build(settings, tokens=tokens, progress=show)
    asked = of_run.open_index(index.folder.name)
    left_out = asked.sketched.left_out
    if not is_first():
        return
    recipe = index.recipe
    say(f"wrote {index.folder}: {count(len(recipe.modules), 'module')}, {size(recipe.bytes_of_row)} a document")
    for reason in sorted(set(left_out.values())):
        names = [name for name, why in left_out.items() if why == reason]
        say(f"  not indexed: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and (warning := asked.probe().warning):
        say(f"! {warning}", "yellow")


def table_of(
    job: "Job",
    texts: tuple[str, ...],
    files: tuple[str, ...],
    cosine: bool,
    tokens: int,
    step: int | None,
    name: str | None,
) -> "ScoreTable":
    """Return the scores of a run's training documents for texts and for the records of files."""
    from treering.core.errors import ConfigError

    of_run = opened(job, step)
    queries = {text: of_run.text(text) for text in texts}
    if len(queries) < len(texts):
        raise ConfigError("a query is given twice; leave one of them out")
    return of_run.open_index(name).scores(queries | of_run.records(files), cosine=cosine, tokens=tokens)
