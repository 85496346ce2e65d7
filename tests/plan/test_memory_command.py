"""`treering plan`, run in this process: does it fit, and what to write if it does not."""

import re
from types import SimpleNamespace

import pytest

from tests.toy_run import folder
from treering.cli import entry
from treering.cli import plan as command
from treering.core.errors import PlanError
from treering.memory import Peak
from treering.memory.timeline import PHASES
from treering.memory.tracker import CATEGORIES


@pytest.fixture
def file(tmp_path):
    config_file = tmp_path / "run.yaml"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = folder(tmp_path / "model", **sizes)
    techniques = "techniques: {full: , shard: }\n"
    config_file.write_text(
        f"model: {model}\ndata: {{train: x.jsonl, max_length: 2000}}\n{techniques}output: {tmp_path}/run\n"
    )
    return config_file


def plan(capsys, *arguments: object) -> str:
    assert entry.run(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_it_says_what_a_step_of_the_configured_length_needs(file, capsys):
    output = plan(capsys, file)
    assert "2,000 tokens need" in output and "at its peak, in" in output and output.count("GiB on each rank") == 1
    assert "fits" not in output  # nobody said how large the device is
    assert "300 tokens need" in plan(capsys, file, "--length", 300)


def test_what_fits_is_said_to_fit_and_how_long_it_could_be(file, capsys):
    output = plan(capsys, file, "--world", 4, "--gpu", "8GiB")
    assert "of 8.0: fits" in output and "would fit" not in output
    (longest,) = re.findall(r"longest that fits: ([\d,]+) tokens", output)
    assert int(longest.replace(",", "")) > 20_000


def test_what_does_not_fit_is_told_what_to_write(file, capsys, monkeypatch):
    def refuse(state: SimpleNamespace, length: int, like: SimpleNamespace) -> None:
        if state.config.techniques.tiledblock:
            raise PlanError("tiledblock: the block is not laid out in a known way")

    def forecast(state: SimpleNamespace, length: int) -> SimpleNamespace:
        """Each switch halves what is needed, and tiled blocks do not go with this model."""
        t = state.config.techniques
        on = [
            t.tiledloss is not None,
            t.recompute is not None,
            t.recompute is not None and t.recompute.offload == "cpu",
        ]
        categories = dict.fromkeys(CATEGORIES, 2**33 / 2 ** sum(on) / state.ranks)
        peak = Peak(phases=dict.fromkeys(PHASES, categories), host=0.0, reserved=0.0)
        return SimpleNamespace(at=lambda length: peak, longest=lambda room: 0)

    monkeypatch.setattr(command, "_forecast", forecast)
    monkeypatch.setattr(command, "_peak_within", lambda state, length, *_: forecast(state, length).at(length))
    monkeypatch.setattr(command, "_refuse_unusable", refuse)
    output = plan(capsys, file, "--gpu", "17GiB", "--length", 16000)
    assert "need 64.0 GiB on each rank of 17.0: does NOT fit" in output
    assert "would fit with a tiled loss, recompute:\n      tiledloss:\n      recompute:" in output
    assert "would fit with 2 ranks, a tiled loss, recompute, activations" in plan(capsys, file, "--gpu", "4GiB")


def test_a_proposal_needs_host_memory_that_there_is(file, capsys, monkeypatch):
    """Each switch halves what a device needs; what is offloaded needs 32 GiB of the host, for all ranks together."""

    def forecast(state: SimpleNamespace, length: int) -> SimpleNamespace:
        again = state.config.techniques.recompute
        away = again is not None and again.offload == "cpu"
        on = [state.config.techniques.tiledloss is not None, again is not None, away]
        categories = dict.fromkeys(CATEGORIES, 2**33 / 2 ** sum(on) / state.ranks)
        host = 2**35 / state.ranks if away else 0.0
        peak = Peak(phases=dict.fromkeys(PHASES, categories), host=host, reserved=0.0)
        return SimpleNamespace(at=lambda length: peak, longest=lambda room: 0)

    monkeypatch.setattr(command, "_forecast", forecast)
    monkeypatch.setattr(command, "_peak_within", lambda state, length, *_: forecast(state, length).at(length))
    monkeypatch.setattr(command, "_refuse_unusable", lambda state, length, like: None)
    output = plan(capsys, file, "--gpu", "9GiB", "--length", 16000)
    assert "recompute: {offload: cpu}\n    with 8.0 GiB on each rank, 32.0 GiB of host memory on a node" in output
    output = plan(capsys, file, "--gpu", "9GiB", "--length", 16000, "--host", "20GiB")
    assert "would fit with 2 ranks, a tiled loss, recompute:" in output and "    with 8.0 GiB on each rank\n" in output
    output = plan(capsys, file, "--length", 16000, "--set", "techniques.recompute.offload=cpu", "--host", "20GiB")
    assert "needs 16.0 GiB on each rank, 32.0 GiB of 20.0 GiB of host memory on a node" in output


def test_the_host_memory_is_a_size(file, capsys):
    assert entry.run(["plan", str(file), "--host", "much"]) != 0
    assert "--host is 'much'; write the memory of one node's host" in capsys.readouterr().err


SHARED = ("--set", "techniques.ulysses={}", "--set", "mesh.sequence=4", "--set", "data.max_length=40000")


def test_several_ranks_have_times_and_other_meshes(file, capsys):
    output = plan(capsys, file, "--ranks", 8, *SHARED, "--node", 4, "--between", 25, "--schedule", "--gpu", "3GiB")
    assert "on nodes of 4 ranks, 350 GB/s inside one and 25 GB/s between them, 400 TFLOP/s" in output
    assert re.search(r"ulysses +all_to_all.* inside a node, +0 B to others", output)
    assert re.search(r"shard +all_gather.* inside a node, +[\d.]+ [KM]iB to others.*, while it computes", output)
    assert "arithmetic : messages" in output and "tokens a second" in output
    assert "a layer of these tokens sends, forward and backward" in output and output.count("(chosen)") == 1
    for layout in ("heads", "gathered", "2d (2 × 2)"):
        assert re.search(rf"ulysses +{re.escape(layout)}: [\d.,]+ MiB in \d calls, [\d.]+ ms", output), layout
    assert "among 4 ranks of the axis sequence: 3\n  round 0: 0–3, 1–2" in output
    need = float(re.findall(r"40,000 tokens need ([\d.]+) GiB", output)[0])
    own = re.findall(r"\{replicate: \d, shard: \d, sequence: (\d)\} .*; ([\d.]+) GiB", output)
    assert dict(own)["4"] == f"{need}"  # sharded as the configuration is: the same trace
    assert re.search(r"least time of those that fit: mesh: \{replicate: \d, shard: \d, sequence: \d\}", output)


def test_one_rank_sends_nothing_and_has_no_other_mesh(file, capsys):
    output = plan(capsys, file)
    assert "on nodes of" not in output and "meshes of" not in output and "round 0" not in output


def test_a_device_without_a_size_is_an_error(file, capsys):
    assert entry.run(["plan", str(file), "--gpu", "big"]) == 2
    assert "such as 80GiB" in capsys.readouterr().err


def test_a_process_that_has_trained_is_told_to_plan_in_a_fresh_one(file):
    import subprocess
    import sys

    code = (
        "import torch; torch.ones((), requires_grad=True).backward(); from treering.cli import entry; "
        f"raise SystemExit(entry.run(['plan', {str(file)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and "plan in a fresh process" in done.stderr
