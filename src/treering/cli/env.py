"""`treering env`: a block to paste into a bug report."""

NAME = "env"


def command() -> None:
    """Print versions, machine and relevant settings. No secrets: only a fixed list of variables is ever shown."""
    from treering.cli.console import say
    from treering.cli.machine import accelerators, environment, system, versions

    facts = {**versions(), **system(), **accelerators(), **environment()}
    width = max(map(len, facts))
    say("\n".join(["```", *(f"{name:<{width}}  {value}" for name, value in facts.items()), "```"]))
