"""placeholder"""

import typer

NAME = "data"
app = typer.Typer()


@app.command("x")
def x() -> None: ...
@app.command("y")
def y() -> None: ...
