"""The commands by name. Each file imports what is heavy inside its functions: `--help` must not wait for torch."""

from pathlib import Path
from typing import Annotated

import typer

from treering.cli import config, data, doctor, env, influence, inspect, measure, plan, quantize, train

app = typer.Typer(
    name="treering",
    help="Post-train large transformers: without forgetting, in the memory you have, across ranks, exactly.",
    epilog="--debug after any command shows the traceback of an error.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help costs as much time again as everything else before it
)


def demo(
    folder: Annotated[Path, typer.Option(help="Where the steps of the demo go.")] = Path("runs/demo"),
) -> None:
    """Pretrain, teach and export a small model. No network, no GPU, a few minutes."""
    from importlib import import_module

    from treering.cli.console import Live

    module = import_module("treering.demo")  # by name: the package demo may import cli, and cli not demo
    module.run(folder, console=Live())


app.command("train")(train.command)
app.command("plan")(plan.command)
app.command(measure.NAME)(measure.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo)
app.command("env")(env.command)
app.command("export")(train.export_command)
app.command("inspect")(inspect.command)
app.command("quantize")(quantize.command)
app.add_typer(data.app, name="data")
app.add_typer(influence.app, name="influence")
app.add_typer(config.app, name="config")
app.add_typer(config.recipes_app, name="recipes")
