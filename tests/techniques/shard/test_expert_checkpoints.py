"""Checkpoints and exports of experts that are assigned to ranks: the same on any other number of ranks."""

import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.skips import sharded_codes
from tests.toy_run import job
from treering.core.seeds import generator
from treering.core.sharded import put
from treering.train.checkpoints.files import read

pytestmark = sharded_codes
ADAPTERS = (
    tr.LoRA(rank=2, targets="all-linear"),
    tr.LoRA(name="second", rank=3, targets=("down_proj",)),
)
PACKED = (*ADAPTERS, tr.Quantize(format="int8"))


def folder(root):
    """The toy folder, with a mixture of four experts as its model."""
    toy = job(root)
    config = hf.Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        eos_token_id=257,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    hf.Qwen3MoeForCausalLM(config).save_pretrained(toy.model.path)
    return root


def trained(root, output, techniques, mesh):
    from treering.train import train
    from treering.train.config import Checkpoint

    short = {"steps": 4, "checkpoint": Checkpoint(every=2, keep=5)}
    sharded = (tr.Shard(),) if mesh is not None else ()
    train(job(root, output, techniques=(*techniques, *sharded), mesh=mesh or {}, train=short))


def saved(root, output):
    return {n: t.read() for n, t in read(root / output / "checkpoints" / "step-4").tensors.items()}


def resumed(root, name, ranks, techniques, mesh):
    """What the last checkpoint holds of a run that was stopped in the middle, on `ranks` from there."""
    shutil.copytree(root / "whole", root / name)
    shutil.rmtree(root / name / "checkpoints" / "step-4")
    on_ranks(ranks, trained, root, name, techniques, mesh)
    assert "resumes after step 2" in (root / name / "metrics.jsonl").read_text()
    return saved(root, name)


@pytest.mark.parametrize(
    ("first", "mesh", "ranks", "then", "techniques"),
    [
        (2, {"expert": 2}, 2, {"expert": 2}, PACKED),
        (2, {"expert": 2}, 3, {}, PACKED),
        (4, {"expert": 2}, 1, None, PACKED),
        pytest.param(2, {"expert": 2}, 4, {"expert": 2}, PACKED, marks=pytest.mark.slow),
        pytest.param(2, {"expert": 2}, 1, None, (tr.Full(),), marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2}, 3, {}, (tr.Full(),), marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2}, 4, {"expert": 4}, PACKED, marks=pytest.mark.slow),
        pytest.param(2, {}, 4, {"expert": 2}, ADAPTERS, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, first, mesh, ranks, then, techniques):
    root = folder(tmp_path)
    on_ranks(first, trained, root, "whole", techniques, mesh)
    wanted = saved(root, "whole")
    found = resumed(root, "again", ranks, techniques, then)

    assert any("exp_avg" in name and "second" in name for name in wanted) or techniques == (tr.Full(),)
    assert_all_same(found, wanted, 0.0 if (first, mesh) == (ranks, then) else 1e-4)


def test_a_checkpoint_holds_adapters_and_moments_alone(tmp_path):
    root = folder(tmp_path)
    on_ranks(2, trained, root, "whole", PACKED, {"expert": 2})
    checkpoint = root / "whole" / "checkpoints" / "step-4"
    tensors = saved(root, "whole")
    assert not [name for name in tensors if ".packed" in name]
    weights = [t for name, t in tensors.items() if name.endswith((".A", ".B")) and not name.startswith("optimizer")]
    adapters = sum(4 * t.numel() for t in weights)
    assert adapters > 0
    assert sum(4 * t.numel() for t in tensors.values()) <= 1.1 * 3 * adapters
    assert all(path.stat().st_size <= 2 * adapters + 2**14 for path in checkpoint.glob("rank-*.safetensors"))


def exported(root, output, techniques, mesh):
    run = tr.compose(
        str(root / "model"),
        [*techniques, *([tr.Shard()] if mesh else [])],
        mesh=tr.mesh(**mesh) if mesh else None,
        dtype="float32",
        prepared=root / "prepared",
    )
    for name, parameter in run.trainable():
        put(parameter, torch.randn(parameter.shape, generator=generator(0, name)))
    run.export(root / output, adapter="default" if len(techniques) > 1 else None)
    return True


@pytest.mark.parametrize("techniques", [(tr.Full(),), ADAPTERS])
def test_an_export_is_that_of_one_process(tmp_path, techniques):
    root = folder(tmp_path)
    exported(root, "one", techniques, None)
    assert on_ranks(4, exported, root, "four", techniques, {"expert": 2}) == [True] * 4
    files = sorted(path.name for path in (root / "one").glob("*.safetensors"))
    assert files and files == sorted(path.name for path in (root / "four").glob("*.safetensors"))
    for name in files:
        assert_all_same(load_file(root / "four" / name), load_file(root / "one" / name))
