"""The commands. Each file imports what is heavy inside its function: `--help` must not wait for torch."""

import typer

from treering.cli import (
    config,
    data,
    demo,
    doctor,
    env,
    export,
    inspect,
    measure,
    plan,
    recipes,
    train,
)

app = typer.Typer(
    name="treering",
    help="Post-train large transformers: without forgetting, in the memory you have, across ranks, exactly.",
    epilog="--debug after any command shows the traceback of an error.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help costs as much time again as everything else before it
)

for module in (train, plan, measure, doctor, demo, env, export, inspect):
    app.command(module.NAME)(module.command)
for group in (data, config, recipes):
    app.add_typer(group.app, name=group.NAME)
