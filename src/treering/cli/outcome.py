"""How a rank ended, left where torch's elastic agent and our own `--nproc` look for it."""

import json
import os
import time
from pathlib import Path

WHERE = "TORCHELASTIC_ERROR_FILE"  # set for each rank by the agent


def leave(message: str, code: int) -> None:
    """For the agent, which otherwise knows no more than the order in which it saw ranks die."""
    if WHERE in os.environ:
        said = {"message": message, "timestamp": str(int(time.time())), "exit_code": code}
        Path(os.environ[WHERE]).write_text(json.dumps(said), encoding="utf-8")


def left(logs: Path) -> int | None:
    """The exit code of rank 0, if it has told one."""
    for file in logs.rglob("0/error.json"):
        return int(json.loads(file.read_text(encoding="utf-8"))["exit_code"])
    return None
