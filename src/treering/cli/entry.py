"""The end of a command: an exit code, a message for an error of ours, a file with the traceback for any other."""

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

from treering.cli.launch import write_outcome
from treering.core.errors import TreeringError

CRASHED = 70  # EX_SOFTWARE; 1 to 8 are those of TreeringError, 2 is also a wrong argument
INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command of this process's arguments, and end the process."""
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # `treering … | head`
            code = code or 1
    if "torch" in sys.modules:
        # After FSDP on gloo a normal interpreter exit now and then aborts in a worker thread's destructor.
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command of `arguments` and return its exit code."""
    debug = "--debug" in arguments
    try:
        from treering.cli.app import app

        app([a for a in arguments if a != "--debug"], prog_name="treering")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except TreeringError as error:
        write_outcome(_explain(error, debug), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        _write("interrupted")
        return INTERRUPTED
    except Exception as error:
        _report(error, debug)
        return CRASHED
    return 0


def _explain(error: TreeringError, debug: bool) -> str:
    from treering.cli.text import plain_lines, scrubbed

    if debug:
        _write(plain_lines(scrubbed(traceback.format_exc())))
    message = scrubbed(str(error))
    _write(plain_lines(message))
    return message


def _report(error: Exception, debug: bool) -> None:
    from treering.cli.text import plain_lines, scrubbed, short

    text = scrubbed("".join(traceback.format_exception(error)))
    if debug:
        _write(plain_lines(text))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="treering-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(plain_lines(text))
        where = f"The traceback is in {file.name}"
    except OSError:  # the disk may be what is full
        _write(plain_lines(text))
        where = "The traceback is above, because it could not be written to a file"
    name = type(error).__name__
    _write(
        f"{name}: {short(scrubbed(str(error)), 300)}\n"
        f"This is a bug in treering, or in a library that it uses. {where}\n"
        "Please report it with that and the output of `treering env`; --debug shows it here."
    )


def _write(text: str) -> None:
    rank = os.environ.get("RANK", "")
    mark = f"[rank {rank}] " if rank.isdigit() and rank != "0" else ""
    print(mark + text, file=sys.stderr, flush=True)  # noqa: T201 — the console may be what failed
