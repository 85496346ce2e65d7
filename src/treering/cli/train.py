"""`treering train`: run a configuration, on the ranks of a launcher or on ranks that it starts itself."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treering.cli.launch import Ranks, export, forgotten_srun, ranks_from
from treering.cli.options import ConfigFile, Settings, load
from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig
    from treering.train.config import Job

NAME = "train"


def command(
    file: ConfigFile,
    settings: Settings = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Start so many ranks on this machine; no torchrun needed.")
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
    ranks = ranks_from(os.environ)
    if ranks is not None:
        _refuse_second_launcher(nproc, ranks)
        export(ranks, os.environ)
    elif nproc is not None and nproc > 1:
        arguments = ["train", str(file), *(part for s in settings or () for part in ("--set", s))]
        arguments += ["--profile"] * profile + ["--debug"] * ("--debug" in sys.argv)
        _start_ranks(config, nproc, arguments)
        return
    elif nproc is None and (tasks := forgotten_srun(os.environ)):
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
        mesh=asdict(config.mesh),
        seed=config.seed,
        written=to_yaml(_unforced(config)),
    )


def _unforced(config: "RunConfig") -> "RunConfig":
    """Return what is saved with the run: `force` holds for one start, and not for those that follow."""
    settings = replace(config.train, checkpoint=replace(config.train.checkpoint, force=False))
    return replace(config, train=settings)


def _train(config: "RunConfig", profile: bool) -> None:
    from treering.cli.progress import Live
    from treering.train.callbacks import Console
    from treering.train.run import train

    screen = Live()
    try:
        train(job_of(config), [Console(screen)], profile=profile)
    finally:
        screen.stop()  # an error must not leave the terminal without its cursor


def _refuse_second_launcher(nproc: int | None, ranks: Ranks) -> None:
    if nproc is not None and nproc != ranks.world:
        raise ConfigError(
            f"--nproc {nproc} was given, but {ranks.by} has already started {ranks.world} ranks; leave --nproc out"
        )


def _start_ranks(config: "RunConfig", nproc: int, arguments: list[str]) -> None:
    from treering.cli.console import say
    from treering.cli.elastic import SAVING, saving_time, start

    if (seconds := saving_time()) < SAVING:
        say(f"torch 2.11 kills ranks that need more than {seconds} s for their checkpoint after a signal; 2.12 waits")
    # The ranks find RANK in their environment, so that they join instead of starting more.
    start(nproc, arguments, Path(config.output) / "logs")
