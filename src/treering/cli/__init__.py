"""The command line: one file a command, the configuration's schema, and the parsing of configuration files."""


def main() -> None:
    """Run the console script `treering`."""
    from treering.cli.entry import main

    main()
