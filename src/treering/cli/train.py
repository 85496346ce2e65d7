"""`treering train` and `treering export`: run a configuration, and write what was trained for other programs.

A run uses the ranks that a launcher started, or starts them.
"""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from treering.cli import launch
from treering.cli.config import ConfigFile, Settings, load
from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig
    from treering.train.config import Job


def command(
    file: ConfigFile,
    settings: Settings = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Start this many ranks on this machine; no torchrun needed.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Break the time of a step down.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume from a checkpoint although the data, seed or batch changed.")
    ] = False,
) -> None:
    """Train a model as FILE describes. The same file runs alone, with --nproc, under torchrun and under srun."""
    if force:
        settings = [*(settings or ()), "train.checkpoint.force=true"]
    config = load(file, settings)
    ranks = launch.ranks_from(os.environ)
    if ranks is not None:
        _refuse_second_launcher(nproc, ranks)
        launch.set_environment(ranks, os.environ)
    elif nproc is not None and nproc > 1:
        arguments = ["train", str(file), *(part for s in settings or () for part in ("--set", s))]
        arguments += ["--profile"] * profile + ["--debug"] * ("--debug" in sys.argv)
        _start_ranks(config, nproc, arguments)
        return
    elif nproc is None and (tasks := launch.forgotten_srun(os.environ)):
        raise ConfigError(
            f"this SLURM job has {tasks} tasks, but it was started without srun, so there is only this one; "
            "write `srun treering train …`, or `--nproc N` for the ranks of one machine"
        )
    _train(config, profile)


def job_of(config: "RunConfig") -> "Job":
    """Return the run that `config` describes."""
    from treering.cli.parsing import to_yaml
    from treering.train.config import Job

    return Job(
        model=config.model,
        data=config.data,
        techniques=config.techniques.chosen(),
        output=config.output,
        train=config.train,
        statistics=config.statistics,
        objective=config.objective.chosen(),
        mesh=asdict(config.mesh),
        seed=config.seed,
        written=to_yaml(_unforced(config)),
    )


def _unforced(config: "RunConfig") -> "RunConfig":
    """Return what is saved with the run: `force` applies to one start, and not to those that follow."""
    settings = replace(config.train, checkpoint=replace(config.train.checkpoint, force=False))
    return replace(config, train=settings)


def _train(config: "RunConfig", profile: bool) -> None:
    from treering.cli.console import Live
    from treering.train.callbacks import Console
    from treering.train.run import train

    screen = Live()
    try:
        train(job_of(config), [Console(screen)], profile=profile)
    finally:
        screen.stop()  # an error must not leave the terminal without its cursor


def _refuse_second_launcher(nproc: int | None, ranks: launch.Ranks) -> None:
    if nproc is not None and nproc != ranks.world:
        raise ConfigError(
            f"--nproc {nproc} was given, but {ranks.by} has already started {ranks.world} ranks; leave --nproc out"
        )


def _start_ranks(config: "RunConfig", nproc: int, arguments: list[str]) -> None:
    from treering.cli.console import say

    if (seconds := launch.saving_time()) < launch.SAVING:
        say(f"torch 2.11 kills ranks that need more than {seconds} s for their checkpoint after a signal; 2.12 waits")
    # The ranks find RANK in their environment, so that they join instead of starting more.
    launch.start(nproc, arguments, Path(config.output) / "logs")


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The `output` folder of a run.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)],
    adapter: Annotated[
        str | None, typer.Option(help="Write only this adapter, in peft's format, instead of the merged model.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step, not the newest.")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep quantized weights as codes and scales; with --adapter, that too.")
    ] = False,
    experts: Annotated[
        Literal["stacked", "each"],
        typer.Option(help="Of --adapter: experts as peft stacks them, or a pair for each, for engines that want that."),
    ] = "stacked",
) -> None:
    """Write a trained model for others to load: a Hugging Face folder, or one adapter as a peft folder."""
    config = load(run / "config.yaml", None)
    from treering.cli.console import say
    from treering.train.export import export

    job = replace(job_of(config), output=str(run))  # the folder may have been moved since
    say(f"wrote {export(job, to, adapter=adapter, step=step, packed=packed, experts=experts)}")
