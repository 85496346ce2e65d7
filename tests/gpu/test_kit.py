"""`python -m benchmarks.gpu`: its dry run, what it needs, and what becomes of rows that go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.gpu import record
from benchmarks.gpu.catalogue import ROWS
from benchmarks.gpu.longest import following
from benchmarks.gpu.record import Figure
from benchmarks.gpu.runner import Runner, machine

ROOT = Path(__file__).parents[2]
# What a machine with a card may lack. transformers itself needs yaml, and so it is refused to us alone.
HIDDEN = """\
import builtins, sys
HIDDEN, OURS = {"pydantic", "rich", "typer", "jinja2", "datasets", "hypothesis", "pytest"}, {"treering", "benchmarks"}
plain = builtins.__import__

class Hide:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in HIDDEN or name == "treering.cli"
        return None if hidden else self.finder.find_spec(name, path, target)

def imported(name, globals=None, locals=None, fromlist=(), level=0):
    by = (globals or {}).get("__name__", "").split(".")[0]
    if name.split(".")[0] == "yaml" and by in OURS:
        raise ModuleNotFoundError(f"{by} imports {name}")
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = imported
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""


def test_a_dry_run_measures_every_row_with_nothing_but_torch_and_transformers(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    rows = [name for name in ROWS if name != "checks"]  # those are run by test_checks
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", tmp_path / "out", "--rows", ",".join(rows)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "gpu-dry.cpu.json").read_text())
    assert [name for name in ROWS if any(row["row"] == name for row in found)] == rows
    assert all(row["dry"] and row["device"] == "CPU" and row["failed"] is None for row in found)
    peaks = [row for row in found if "peak above" in row["figure"]]
    assert peaks and all(row["ours"] is None for row in peaks), "a CPU has no peak to measure"
    exact = [row for row in found if row["row"] in ("kernels", "flex") and "float64" in row["figure"]]
    assert len(exact) == 18 and all(row["holds"] for row in exact)


def test_a_dry_run_is_kept_out_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "HERE", tmp_path)
    row = record.measured(Figure(figure="f", case="c", ours=1.0), "loss", device="CPU", dry=True, command="x")
    record.save(tmp_path / "results" / "gpu.cpu.json", [vars(row)])
    with pytest.raises(ValueError, match="dry run"):
        results.render()
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", "benchmarks/results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "another --out" in done.stderr


def test_rows_that_go_wrong_are_recorded_and_the_next_go_on(tmp_path, monkeypatch):
    names = [f"tests.gpu.broken_rows:{name}" for name in ("raises", "ends", "hangs", "works")]
    runner = Runner(names, seconds=120, folder=tmp_path, dry=True, grace=1.0)
    runner.run()
    assert not runner.complete and json.loads(runner.path.read_text()) == runner.rows
    of = {name: [row for row in runner.rows if row["row"] == name] for name in names}
    raises, ends, hangs, works = (of[name] for name in names)
    assert [row["failed"] for row in (raises[0], ends[0], hangs[0], works[0])] == [None] * 4
    assert raises[1]["failed"].startswith("ValueError at broken_rows.py:")
    assert "a reason with | and lines" in raises[1]["failed"]
    assert "exit code 9" in ends[1]["failed"] and "within its limit" in hangs[1]["failed"]
    assert len(works) == 1 and works[0]["ratio"] == 3.0 and not works[0]["holds"]
    monkeypatch.setattr(results, "HERE", tmp_path)
    record.save(tmp_path / "results" / "gpu.h100.json", [row | {"dry": False} for row in runner.rows])
    assert r"failed: ValueError at" in results.render() and r"a reason with \| and" in results.render()


def test_what_there_is_no_time_for_is_recorded(tmp_path):
    runner = Runner(["loss", "tiles"], seconds=0, folder=tmp_path, dry=True)
    runner.run()
    assert [row["row"] for row in runner.rows] == ["loss", "tiles"] and not runner.complete
    assert all("not begun" in row["failed"] for row in runner.rows)


def test_a_run_of_some_rows_keeps_what_is_known_of_the_others(tmp_path):
    rows = [
        vars(
            record.measured(Figure(figure="f", case="c", ours=1.0), name, device="NVIDIA H100", dry=False, command="x")
        )
        for name in ("loss", "tiles")
    ]
    record.save(tmp_path / "gpu.h100.json", rows)
    runner = Runner(["loss"], seconds=0, folder=tmp_path, dry=False)
    runner._hello("NVIDIA H100 80GB HBM3")
    assert [row["row"] for row in runner.rows] == ["tiles"]
    runner._add(rows[0] | {"ours": 2.0})
    assert [(row["row"], row["ours"]) for row in json.loads(runner.path.read_text())] == [("loss", 2.0), ("tiles", 1.0)]


@pytest.mark.parametrize(
    ("device", "short"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("Some Card 3", "some-card-3")],
)
def test_files_are_called_after_the_card(device, short):
    assert machine(device) == short


def test_the_search_for_the_longest_sequence_ends_at_the_limit():
    def search(limit, capacity):
        tried, worst, tokens, probes = [], None, 128, 0
        while tokens is not None:
            probes += 1
            if tokens <= limit:
                tried.append((tokens, None if capacity is None else 1000 + 10 * tokens))
            else:
                worst = tokens
            tokens = following(tried, worst, capacity=capacity, step=16)
        return tried[-1][0], worst, probes

    best, worst, probes = search(limit=5000, capacity=None)
    assert best <= 5000 < worst and worst - best <= 16 and probes <= 16
    # A card tells its peaks: from two of them on, the limit is known.
    best, worst, probes = search(limit=5000, capacity=52_700)
    assert best <= 5000 < worst and worst - best <= 16 and probes <= 12
