"""An environment for another package: its own packages, and ours behind them, so that both sides run on one torch."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def python(name: str, packages: Sequence[str], proof: str) -> Path:
    """The interpreter of `.venv-peers/NAME`, made anew unless it holds these `packages`; then `proof` imports."""
    folder, behind = ROOT / ".venv-peers" / name, sysconfig.get_path("purelib")
    interpreter, made = folder / "bin" / "python", folder / "made.txt"
    wanted = "\n".join([behind, *packages])
    if made.exists() and made.read_text("utf-8") == wanted:
        return interpreter
    venv.create(folder, with_pip=True, clear=True)
    own = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (own / "ours.pth").write_text(behind + "\n", "utf-8")
    # Without their dependencies: torch and transformers are to be ours, whatever the package would like.
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
    subprocess.run([interpreter, "-c", f"import {proof}"], check=True)
    made.write_text(wanted, "utf-8")
    return interpreter


def ask(interpreter: Path, module: str, *arguments: str) -> Any:
    """What `python -m MODULE ARGUMENTS` says in its last line, as JSON. One thread; errors are shown."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    surroundings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [interpreter, "-W", "ignore", "-m", module, *arguments]
    said = subprocess.run(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(said.strip().splitlines()[-1])
