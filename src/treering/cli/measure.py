"""`treering measure`: a reserved name."""

from treering.errors import TreeringError

NAME = "measure"


class NotInThisVersion(TreeringError):
    exit_code = 2


def command() -> None:
    """Reserved; not in this version."""
    raise NotInThisVersion("`treering measure` is not in this version: the name is reserved, and nothing was measured")
