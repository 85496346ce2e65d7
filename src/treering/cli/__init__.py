"""The command line: one file a command, the configuration's schema, and the door that it is read through."""


def main() -> None:
    """The console script."""
    from treering.cli.entry import main

    main()
