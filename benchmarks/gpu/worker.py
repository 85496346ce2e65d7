"""The process that computes: runs rows one after the other and prints each figure as a line of JSON.

    python -m benchmarks.gpu.worker [--dry-run | --toy] --seconds N NAME …

Lines that begin with MARK are for the runner; whatever else is printed is shown as it is. A row that fails is reported
and the next one goes on, unless the device does not compute any more: then the process ends, and the runner starts
another one.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

from benchmarks.gpu.catalogue import plan_of
from benchmarks.gpu.record import Figure, failed, measured

MARK = "@gpu "
CLOSING = 3.0  # seconds before the end of the whole run in which nothing is measured any more
BROKEN = 3  # exit code: the device does not compute any more


def say(kind: str, **content: Any) -> None:
    sys.stdout.write(MARK + json.dumps({"kind": kind, **content}) + "\n")
    sys.stdout.flush()


def function(name: str) -> Callable[..., Iterator[Figure]]:
    """The generator of a row; its file is imported when the row begins, so that an error in it is the row's own."""
    module, _, attribute = plan_of(name).function.partition(":")
    return getattr(import_module(module), attribute)


def run(name: str, device: Any, seconds: float, command: str) -> bool:
    """Run one row; returns whether the device still computes."""
    from benchmarks.gpu.device import Context

    about = {"device": device.name, "dry": device.toy, "command": f"{command} --rows {name}"}
    try:
        context = Context(device=device, until=time.monotonic() + seconds)
        for figure in function(name)(context):
            say("row", row=asdict(measured(figure, name, **about)))
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        message = f"{type(error).__name__} at {place}: {error}"
        del error, where
        say("row", row=asdict(failed(name, message, **about)))
    return _left_group() and device.usable()


def _left_group() -> bool:
    """Techniques that shard make a process group; the next row begins without one. False if it cannot be ended."""
    import torch.distributed as dist

    try:
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, required=True, help="for all rows together")
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    from benchmarks.gpu.device import Device

    device = Device(dry=options.dry_run, toy=options.toy)
    device.start()
    say("hello", device=device.name)
    command = "python -m benchmarks.gpu" + (" --dry-run" * options.dry_run) + (" --toy" * options.toy)
    for name in options.names:
        say("begin", name=name)
        if kept := device.allocated():
            sys.stderr.write(f"{name} begins with {kept / 2**30:.2f} GiB on the device\n")
        computes = run(name, device, min(plan_of(name).seconds, until - time.monotonic() - CLOSING), command)
        say("end", name=name)
        if not computes:
            os._exit(BROKEN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a process that has used FSDP2 on gloo may abort while the interpreter ends


if __name__ == "__main__":
    main()
