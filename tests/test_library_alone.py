"""The library needs torch, transformers, safetensors, numpy and xxhash, and none of what the command line needs."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# tokenizers: transformers imports it. Modules that do not have the name of their package: see MODULES.
LIBRARY = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "xxhash"}
MODULES = {"pyyaml": "yaml", "types-pyyaml": "types_pyyaml"}
BEHIND = {"accelerate", "click", "pandas", "pydantic_core"}  # come with packages that we ask for


def packages() -> set[str]:
    """Every package that pyproject.toml names, of its extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {Requirement(line).name.lower() for line in lines}


def test_the_library_composes_and_trains_without_the_packages_of_the_command_line():
    assert packages() >= LIBRARY | {"pydantic", "rich", "typer", "pyyaml", "jinja2", "datasets", "pyarrow", "peft"}
    hidden = sorted({MODULES.get(name, name) for name in packages() - LIBRARY} | BEHIND)
    done = subprocess.run(
        [sys.executable, "-m", "tests.library_alone", *hidden],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "measure", done.stdout


def test_a_hidden_package_cannot_be_imported():
    code = "from tests.library_alone import hide\nhide({'xxhash'})\nimport treering.store.model_folder"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'xxhash'" in done.stderr
