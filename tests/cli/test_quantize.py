"""`treering quantize`: a quantized folder without training, and the error of each matrix."""

import json
import math

import pytest
import torch

import treering as tr
from tests.toy_run import folder
from tests.weights import folders
from treering import curvature, formats
from treering.cli import entry
from treering.plan.quantizing import ERRORS, output_error
from treering.techniques.quantize.merged_scales import MERGED


def quantize(model, to, *arguments):
    return entry.run(["quantize", str(model), "--to", str(to), *map(str, arguments)])


def matrices(folder):
    return json.loads((folder / ERRORS).read_text())["matrices"]


@pytest.fixture
def model(tmp_path):
    return folder(tmp_path / "model", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("observer", ["max", "mse"])
def test_a_folder_holds_what_a_run_would_quantize_and_its_errors(observer, model, tmp_path, capsys):
    assert quantize(model, tmp_path / "q", "--format", "int4", "--group", 32, "--observer", observer) == 0
    shown = capsys.readouterr().out
    assert "down_proj" in shown and "14 matrices in 5.00 bits an element" in shown
    run = tr.compose(model, [tr.Quantize(format="int4", group=32, clip=observer)], frozen=True)
    again = tr.compose(tmp_path / "q", [], frozen=True)
    live = dict(again.model.named_parameters())
    for name, tensor in run.model.named_parameters():
        assert torch.equal(live[name], tensor), name
    assert {one["weight"]: pytest.approx(one["weight_error"], rel=1e-4) for one in matrices(tmp_path / "q")} == run.lost
    assert (tmp_path / "q/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert tr.compose(tmp_path / "q", [tr.LoRA(rank=2)]).trainable()


def test_data_gives_the_errors_of_outputs(model, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"after {i} comes {i + 1}"}) + "\n" for i in range(20)))
    assert quantize(model, tmp_path / "q", "--data", text, "--tokens", 200, "--max-length", 64) == 0
    assert "largest of outputs" in capsys.readouterr().out
    assert entry.run(["measure", str(model), "--data", str(text), "--tokens", "200", "--max-length", "64", "--to",
                      str(tmp_path / "s")]) == 0  # fmt: skip
    assert quantize(model, tmp_path / "again", "--statistics", tmp_path / "s") == 0
    assert matrices(tmp_path / "again") == matrices(tmp_path / "q")
    first = matrices(tmp_path / "q")[0]
    name = first["weight"]
    W = dict(tr.compose(model, [], frozen=True).plain([name]))[name]
    Q = dict(tr.compose(tmp_path / "q", [], frozen=True, dequantize=True).plain([name]))[name]
    C = curvature.open(tmp_path / "s")[name]["inputs"].double()
    D = (Q - W).double()
    wanted = math.sqrt(torch.trace(D @ C @ D.T) / torch.trace(W.double() @ C @ W.double().T))
    # The folder's library rounds decoded values to bfloat16.
    assert first["tokens"] == 200 and first["output_error"] == pytest.approx(wanted, rel=1e-2)


def test_the_error_of_outputs_is_that_of_products():
    W, D = torch.randn(8, 6), torch.randn(8, 6) / 10
    x = torch.randn(500, 6)
    found = output_error(W, D, x.T @ x / 500)
    assert found == pytest.approx(float((x @ D.T).norm() / (x @ W.T).norm()), rel=1e-5)
    assert output_error(W, D, torch.zeros(6, 6)) == 0


def test_each_expert_has_a_row_and_its_own_inputs(tmp_path):
    folders.wide("qwen3_moe").save_pretrained(tmp_path / "m")
    model = tr.compose(tmp_path / "m", [], frozen=True)
    batches = [
        {"input_ids": torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    ]
    tr.measure(model, batches, to=tmp_path / "s")
    experts = ("--pattern", "gate_up_proj", "--pattern", "down_proj")
    assert quantize(tmp_path / "m", tmp_path / "q", *experts, "--statistics", tmp_path / "s") == 0
    rows = matrices(tmp_path / "q")
    assert {one["weight"].rpartition(".")[2] for one in rows} == {"gate_up_proj", "down_proj"}
    stack = [one for one in rows if one["weight"] == rows[0]["weight"]]
    statistics = curvature.open(tmp_path / "s")[rows[0]["weight"]]
    assert [one["expert"] for one in stack] == list(range(len(stack)))
    assert [one["tokens"] for one in stack] == statistics["tokens"].tolist()
    W = dict(model.plain([rows[0]["weight"]]))[rows[0]["weight"]]
    form = formats.named("nvfp4")
    for one in stack:
        D = form.decode(form.encode(W[one["expert"]]), W.shape[-1], torch.float32) - W[one["expert"]]
        assert one["output_error"] == pytest.approx(
            output_error(W[one["expert"]], D, statistics["inputs"][one["expert"]])
        )


def test_matrices_that_engines_merge_share_a_global_scale(model, tmp_path):
    assert quantize(model, tmp_path / "q") == 0
    modules = dict(tr.compose(tmp_path / "q", [], frozen=True).model.named_modules())
    for block in range(2):
        for parent, names in (("self_attn", MERGED[0]), ("mlp", MERGED[2])):
            scales = [modules[f"model.layers.{block}.{parent}.{n}.packed"].get_parameter("global") for n in names]
            assert all(torch.equal(scales[0], scale) for scale in scales)
    run = tr.compose(model, [tr.Quantize(format="nvfp4", global_scale="merged")], frozen=True)
    for name, tensor in run.model.named_parameters():
        assert torch.equal(tensor, modules[name.rpartition(".")[0]].get_parameter(name.rpartition(".")[2])), name
    apart = tr.compose(model, [tr.Quantize(format="nvfp4")], frozen=True)
    name = "model.layers.0.self_attn.k_proj.packed.global"
    assert not torch.equal(apart.model.get_parameter(name), run.model.get_parameter(name))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "x.jsonl", "--statistics", "s"], 2, "give one of the two"),
        (["--pattern", "nothing"], 3, "matches no linear"),
        (["--format", "int4", "--group", "48"], 3, "no multiple of 48"),
        (["--format", "int8", "--group", "32"], 2, "int4 and int3 take a group"),
        (["--dequantize"], 3, "holds no quantized weights"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(arguments, code, message, model, tmp_path, capsys):
    assert quantize(model, tmp_path / "q", *arguments) == code
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "q").exists()


def test_quantized_weights_are_not_rounded_twice_unless_asked(tmp_path, capsys):
    stored = folders.published("llama", tmp_path / "m", folders.WRITERS["w4a16"])
    assert quantize(stored, tmp_path / "q") == 3
    assert "dequantize" in capsys.readouterr().err
    assert quantize(stored, tmp_path / "q", "--format", "int8", "--dequantize") == 0
    assert tr.compose(tmp_path / "q", [], frozen=True).plan.notes[0].endswith("int8 (14)")
