"""One family of errors: what was asked, what is there, what to write instead. Each has the exit code of a command."""


class TreeringError(Exception):
    """An error that its message explains. The command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class ConfigError(TreeringError, ValueError):
    """A setting is outside what is allowed. `field` is its dotted path inside the object that raised it.

    Also a ValueError, so that pydantic reports one from a `__post_init__` as an error at a place.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str = ""):
        super().__init__(message)
        self.field = field


class PlanError(TreeringError):
    """Techniques, model and mesh do not fit together; raised before any weight is loaded.

    `settings` are the config keys that decide it (`lora.targets`), so that a front end can point at their lines.
    """

    exit_code = 3

    def __init__(self, message: str, *, settings: tuple[str, ...] = ()):
        super().__init__(message)
        self.settings = settings


class DataError(TreeringError):
    """A source of examples is unreadable or a sample is unusable; names file, line and field."""

    exit_code = 4


class CheckpointError(TreeringError):
    """A checkpoint or model folder is incomplete, damaged, unsafe, or belongs to another run."""

    exit_code = 5


class NumericsError(TreeringError):
    """Too many steps in a row had a gradient that was not finite."""

    exit_code = 6


class Interrupted(TreeringError):
    """A signal asked the run to stop. All finished steps are in a checkpoint, from which the same command resumes."""

    exit_code = 7


class RankLost(TreeringError):
    """Another rank has ended, does not answer, or does something else than this one."""

    exit_code = 8
