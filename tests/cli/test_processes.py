"""What only a process of its own can show: no torch before a configuration is valid, speed, ranks, signals."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from tests.ranks import PATIENCE

SMALL = "model: gpt2\ndata: chat.jsonl\noutput: runs/x\n"
WATCH = """
import sys
from treering.cli import entry
code = entry.run(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "numpy", "datasets") if name in sys.modules]
sys.stderr.write(f"heavy: {heavy}\\n")
sys.exit(code)
"""


def call(*arguments, code="", **environment):
    start = ["-c", code] if code else ["-m", "treering"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_an_invalid_configuration_is_reported_without_torch(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(SMALL + "train: {stps: 3}\n")
    done = call("train", file, "--nproc", 4, code=WATCH)
    assert done.returncode == 2
    assert "run.yaml:4: train.stps" in done.stderr
    assert "heavy: []" in done.stderr


def test_a_valid_one_is_checked_without_torch(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(SMALL + "techniques: {lora: , shard: , full: , compile: }\n")
    done = call("config", "check", file, code=WATCH)
    assert (done.returncode, done.stderr) == (0, "heavy: []\n")


def test_help_of_every_command_needs_no_torch():
    commands = ["", "train", "plan", "measure", "doctor", "demo", "env", "export", "inspect"]
    commands += [f"influence {c}" for c in ("query", "scores", "clean")]
    commands += [f"data {c}" for c in ("show", "build", "check")]
    commands += [f"config {c}" for c in ("check", "show", "schema")]
    commands += [f"recipes {c}" for c in ("ls", "cp")]
    code = f"""
import sys
from treering.cli import entry
for command in {commands!r}:
    assert entry.run([*command.split(), "--help"]) == 0, command
heavy = [name for name in ("torch", "transformers", "numpy", "datasets", "yaml") if name in sys.modules]
assert not heavy, heavy
"""
    done = call(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: treering") == len(commands)


def test_help_takes_less_than_a_quarter_of_what_torch_takes_to_import():
    # Processor time, the best of a few, and as a ratio: how fast the machine is and what else it does is no finding.
    torch = min(_processor_seconds(code="import torch") for _ in range(3))
    assert min(_processor_seconds("train", "--help") for _ in range(5)) < 0.25 * torch


def _processor_seconds(*arguments, code=""):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert call(*arguments, code=code).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


STAND_IN = """
import os, sys, time
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], sys.argv[1:], os.getpid(), flush=True)
if "fail" in sys.argv and rank == "1":
    sys.exit("PlanError: no room\x1b[2J")
if "well" not in sys.argv:
    time.sleep(100_000)
"""
START = """
import os, sys
from pathlib import Path
from treering.cli.launch import RanksFailed, start
os.environ["PYTHONPATH"] = sys.argv[1]  # in the ranks, the stand-in is treering; in this process it is not
try:
    for word in sys.argv[2:]:
        start(2, ["train", word], Path(sys.argv[1]) / "logs")
except RanksFailed as error:
    sys.exit(f"{error.exit_code}: {error}")
"""


@pytest.fixture
def stand_in(tmp_path):
    """A folder in which `python -m treering` is a few lines that know their rank, and fail or wait as they are told."""
    package = tmp_path / "treering"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return tmp_path


def test_ranks_are_started_and_the_first_to_fail_is_told(stand_in):
    done = call(stand_in, "well", "fail", code=START)
    assert "rank 0 of 2 ['train', 'well']" in done.stdout
    assert "rank 1" not in done.stdout
    assert done.stderr.startswith("1: rank 1 ended with exit code 1. The end of its log:\nPlanError: no room\\x1b[2J\n")
    assert done.returncode == 1


def test_a_terminated_launcher_takes_its_ranks_with_it(stand_in):
    started = [sys.executable, "-c", START, str(stand_in), "wait"]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        rank = int(process.stdout.readline().split()[-1])
        process.send_signal(signal.SIGTERM)
        _, stderr_text = process.communicate(timeout=PATIENCE)
    assert stderr_text.endswith("143: stopped by SIGTERM\n")
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)


END_CHILDREN = """
import os, signal, subprocess, sys
from treering.cli.launch import end_children
obedient = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100_000)"])
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(100_000)"
stubborn = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
stubborn.stdout.readline()
end_children(signal.SIGTERM, 1.0)
for child in (obedient, stubborn):
    try:
        os.kill(child.pid, 0)
    except ProcessLookupError:
        print("gone")
"""


def test_ranks_that_the_agent_did_not_list_yet_are_ended():
    done = call(code=END_CHILDREN)
    assert done.stdout.split() == ["gone", "gone"], done.stderr


def test_nproc_trains_on_ranks_of_its_own(chat):
    few = ["model.initialise=true", "train.steps=2", "train.tokens_per_step=64", "data.max_length=48"]
    arguments = [part for setting in few for part in ("--set", setting)]
    done = call("train", chat, "--nproc", 2, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1
    assert (chat.parent / "run" / "checkpoints" / "step-2" / "rank-00001.safetensors").is_file()


def test_a_pipe_that_closes_is_no_crash():
    done = subprocess.run(
        f"{sys.executable} -m treering config schema | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.strip() == "{"
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
