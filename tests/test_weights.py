"""Plain weights in and out of Hugging Face folders: what transformers wrote and reads is what we read and write."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import ARCHITECTURES, build, save
from treering.core.seeds import generator
from treering.store.model_folder import INDEX

IDS = torch.randint(3, 128, (2, 14), generator=generator(0, "ids"))
# Their reference is eager attention, which caps scores, or appends the sinks to them, in another order of operations.
LOOSE = {"gemma2": 1e-6, "gpt_oss": 1e-6}


def opened(folder, **how):
    """As anybody opens a model: with transformers, whose sdpa serves most; gemma2 and gpt_oss need eager."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = AutoConfig.from_pretrained(folder).model_type
    attention = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **how).eval()


@torch.no_grad()
def logits(model) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


def stored(folder) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return found


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, f"{name} is {found[name].dtype}, was {value.dtype}"
        assert torch.equal(found[name], value), f"{name} differs"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folder_goes_through_and_comes_out_as_it_was(arch, tmp_path):
    folder = save(arch, tmp_path / "m")
    run = tr.compose(folder, [tr.Full()])
    reference = logits(opened(folder))
    assert_same(logits(run.model), reference, LOOSE.get(arch, 0.0), "logits")
    exported = run.export(tmp_path / "out")
    assert_same_bytes(stored(exported), stored(folder))
    assert torch.equal(logits(opened(exported)), reference)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_bfloat16_folder_stays_what_it_is(arch, tmp_path):
    build(arch).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    reference = opened(tmp_path / "m", dtype="auto")
    run = tr.compose(tmp_path / "m", [tr.Full()])
    ours, theirs = run.model.state_dict(), reference.state_dict()
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}
    exported = run.export(tmp_path / "out")
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_bytes(stored(exported), stored(tmp_path / "theirs"))
    assert opened(exported, dtype="auto").dtype == torch.bfloat16


def through(folder, out):
    run = tr.compose(folder, [tr.Full(), tr.Shard()])
    found = logits(run.model)
    run.export(out)
    return found


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "gpt2", "phi3", "gemma3"])
def test_two_ranks_read_and_write_the_same_folder(arch, tmp_path):
    folder = save(arch, tmp_path / "m")
    first, second = on_ranks(2, through, folder, tmp_path / "out")
    assert_same(first, logits(opened(folder)), LOOSE.get(arch, 0.0), "logits")
    assert torch.equal(first, second)
    assert_same_bytes(stored(tmp_path / "out"), stored(folder))


def test_another_dtype_is_cast_once_and_told_in_the_config(tmp_path):
    folder = save("llama", tmp_path / "m")
    run = tr.compose(folder, [tr.Full()], dtype="bfloat16")
    exported = run.export(tmp_path / "out")
    assert_same_bytes(stored(exported), {n: v.to(torch.bfloat16) for n, v in stored(folder).items()})
    assert opened(exported, dtype="auto").dtype == torch.bfloat16


def exported_live(folder):
    model = build("llama").to(torch.bfloat16)  # its config still says float32, and no architecture
    return tr.compose(model, [tr.Full(), tr.Shard()]).export(folder)


def test_an_export_of_a_live_model_describes_what_is_in_it(tmp_path):
    on_ranks(2, exported_live, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert opened(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_an_export_opens_with_stock_attention(tmp_path):
    from transformers import AutoModelForCausalLM

    exported = tr.compose(save("llama", tmp_path / "m"), [tr.Full()]).export(tmp_path / "out")
    assert "treering" not in (exported / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(exported).config._attn_implementation == "sdpa"


def test_a_tokenizer_and_generation_settings_travel_along(tmp_path):
    folder = save("llama", tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.5}))
    run = tr.compose(folder, [tr.Full()])
    assert run.model.generation_config.eos_token_id == [2, 7]
    exported = run.export(tmp_path / "out")
    assert (exported / "tokenizer.json").read_text() == "{}"
    assert not (exported / "pytorch_model.bin").exists()
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_a_folder_of_several_files_is_one_model(arch, tmp_path):
    build(arch).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / INDEX).is_file() and len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    run = tr.compose(tmp_path / "m", [tr.Full()])
    assert torch.equal(logits(run.model), logits(opened(tmp_path / "m")))


def test_an_export_into_a_folder_with_something_in_it_is_refused(tmp_path):
    run = tr.compose(build("llama"), [tr.Full()])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(tr.CheckpointError, match="is not empty"):
        run.export(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def folder(tmp_path):
    return save("llama", tmp_path / "m")


def refused(folder, *words):
    with pytest.raises(tr.CheckpointError) as caught:
        tr.compose(folder, [tr.Full()])
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "", 5]
)
def test_an_index_that_points_outside_the_folder_is_refused(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(folder, INDEX, repr(str(name)), "only plain names")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}', '{"weight_map": {"a": "x", "b": 1}}', "\xff"],
)
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    refused(folder, INDEX)


def test_a_file_that_the_index_names_and_the_folder_lacks(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00007.safetensors"}}))
    refused(folder, "lacks model-00007.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_a_file_that_was_cut_short(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors", "not a complete safetensors file")


def test_a_folder_with_pickles_alone_is_told_so(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no model.safetensors", "pytorch_model.bin is a pickle and never read")


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_a_path_that_is_nothing(tmp_path):
    refused(tmp_path / "absent", "is not a folder")


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_tensor_is_named(folder):
    changed(folder, lambda t: (t.pop("model.norm.weight"), t.pop("model.layers.1.mlp.up_proj.weight")))
    refused(folder, "no tensor for model.layers.1.mlp.up_proj.weight and 1 more", "LlamaForCausalLM")


def test_a_tensor_of_another_shape_is_named(folder):
    changed(folder, lambda t: t.update({"model.norm.weight": torch.ones(33)}))
    refused(folder, "model.norm.weight", "(33,)", "(32,)")


def test_an_expert_of_another_shape_is_named(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    folder = changed(save("qwen3_moe", tmp_path / "m"), lambda t: t.update({name: torch.ones(25, 32)}))
    refused(folder, "model.layers.1.mlp.experts")


def test_a_missing_expert_is_named(tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    folder = changed(save("qwen3_moe", tmp_path / "m"), lambda t: t.pop(name))
    refused(folder, "model.layers.1.mlp.experts.down_proj", "(3, 32, 24)", "(4, 32, 24)")


def test_tensors_that_the_model_has_no_place_for_are_told(folder):
    changed(folder, lambda t: t.update({"vision.a": torch.ones(1), "vision.b": torch.ones(1)}))
    text = tr.compose(folder, [tr.Full()]).explain()
    assert "2 of the folder's tensors have no place in this model" in text and "vision.a" in text


def test_experts_of_a_layer_that_the_model_does_not_have_are_told(tmp_path):
    extra = {f"model.layers.2.mlp.experts.{i}.down_proj.weight": torch.ones(32, 24) for i in range(4)}
    folder = changed(save("qwen3_moe", tmp_path / "m"), lambda t: t.update(extra))
    assert "4 of the folder's tensors have no place" in tr.compose(folder, [tr.Full()]).explain()


def test_a_tied_copy_in_the_file_is_no_surprise(tmp_path):
    folder = save("gpt2", tmp_path / "m")
    changed(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    run = tr.compose(folder, [tr.Full()])
    assert "no place" not in run.explain()
    assert run.model.lm_head.weight is run.model.transformer.wte.weight


def test_a_live_model_is_not_kept_twice_in_memory():
    import weakref

    model = build("llama")
    held = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    run = tr.compose(model, [tr.LoRA(rank=2)])
    assert not [ref for ref in held if ref() is not None]
    assert "no place" not in run.explain()
