"""Quantized weights of published folders are read bit for bit, and what is not understood is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weights import layouts
from treering.core.errors import CheckpointError
from treering.formats import FP8, MXFP4, NF4, NVFP4, FP8Block, Integer
from treering.store.untrusted import read_header
from treering.weights.quantized.folder import read_quantized
from treering.weights.quantized.opened import FolderReader

NAME = "model.layers.0.mlp.up_proj"


def weight(rows=48, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def opened(folder: layouts.Folder, path: Path):
    """As a folder is opened: through a file, its header and a reader of single tensors."""
    config, tensors = folder
    file = path / "model.safetensors"
    save_file({key: t.contiguous() for key, t in tensors.items()}, file)
    headers = {header.name: (file, header) for header in read_header(file)}
    shapes = {name: (header.dtype, header.shape) for name, (_, header) in headers.items()}
    return read_quantized(config, shapes, FolderReader(headers), "FOLDER")


COMPRESSED = [
    NVFP4(),
    MXFP4(),
    FP8(),
    FP8(scale="tensor"),
    FP8(scale_dtype="bfloat16"),
    FP8Block(block=128),
    FP8Block(block=128, scale_dtype="bfloat16"),
    Integer(width=8, group=0),
    Integer(width=8, group=-1),
    Integer(width=4, group=128),
    Integer(width=4, group=0, scale_dtype="bfloat16"),
    Integer(width=4, group=32, asymmetric=True),
    Integer(width=3, group=32),
    Integer(width=3, group=32, asymmetric=True),
]


def check(quantized, form, w, name=f"{NAME}.weight"):
    (stored,) = quantized.weights.values()
    assert stored.name == name and stored.shape == tuple(w.shape) and stored.form == form
    packed = form.encode(w)
    assert {key: t.tolist() for key, t in stored.read().items()} == {key: t.tolist() for key, t in packed.items()}
    for cut in (slice(0, 1), slice(len(w) // 3, len(w) - len(w) // 4)):
        assert torch.equal(stored.dense(torch.float32, cut), stored.dense(torch.float32)[cut])
    return stored


@pytest.mark.parametrize("form", COMPRESSED, ids=str)
def test_compressed_tensors(form, tmp_path):
    w = weight(rows=200 if isinstance(form, FP8Block) else 48)
    quantized = opened(layouts.compressed_tensors(NAME, w, form), tmp_path)
    stored = check(quantized, form, w)
    rounding = torch.bfloat16 if form.name in ("nvfp4", "mxfp4") else torch.float32
    decoded = form.decode(form.encode(w), 256, rounding)
    assert torch.equal(stored.dense(torch.float32), decoded.float())
    assert torch.equal(stored.dense(torch.bfloat16), decoded.bfloat16())
    assert "1 weights stay as the folder stores them" in quantized.notes()[0]


@pytest.mark.parametrize("width", [3, 5, 6])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_packed_by_words_are_recognised_by_their_size(width, asymmetric, tmp_path):
    form = Integer(width=width, group=32, asymmetric=asymmetric)
    check(opened(layouts.compressed_tensors(NAME, weight(), form, older=True), tmp_path), form, weight())


def test_two_layouts_of_one_size_are_refused(tmp_path):
    form = Integer(width=3, group=0)
    w = weight(columns=21)  # 63 bits in two words, or 10 values, 10 and 1: three words; 20 values: two words each
    check(opened(layouts.compressed_tensors(NAME, w, form), tmp_path), form, w)
    with pytest.raises(CheckpointError, match="two layouts that have the same size"):
        opened(layouts.compressed_tensors(NAME, weight(columns=20), form), tmp_path)


def test_gpt_oss(tmp_path):
    w = torch.stack([weight(seed=i) for i in range(3)])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = check(opened(layouts.gpt_oss(name, w), tmp_path), MXFP4(), w, name)
    decoded = MXFP4().decode(MXFP4().encode(w), 256, torch.bfloat16)
    assert torch.equal(stored.dense(torch.bfloat16), decoded.mT)


@pytest.mark.parametrize("rows, columns", [(256, 256), (200, 300), (576, 100)])
def test_deepseek_with_short_blocks_at_the_edges(rows, columns, tmp_path):
    w = weight(rows, columns)
    check(opened(layouts.deepseek(NAME, w), tmp_path), FP8Block(), w)


@pytest.mark.parametrize("form", [NVFP4(convention="multiply"), FP8(), FP8(scale="tensor"), Integer(group=64)], ids=str)
def test_modelopt(form, tmp_path):
    quantized = opened(layouts.modelopt(NAME, weight(), form), tmp_path)
    check(quantized, form, weight())
    if isinstance(form, NVFP4):
        assert quantized.ignored == (f"{NAME}.input_scale",)
        assert "1 tensors of the folder are ignored: input_scale (1)" in quantized.notes()[1]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes(nested, storage, tmp_path):
    folder = layouts.bitsandbytes(NAME, weight(), nested=nested, storage=storage)
    check(opened(folder, tmp_path), NF4(nested=nested), weight())


def damaged(change, tmp_path, folder=None):
    config, tensors = folder or layouts.compressed_tensors(NAME, weight(), NVFP4())
    change(config, tensors)
    return opened((config, tensors), tmp_path)


REFUSALS = {
    "another method": (lambda c, t: c.update(quant_method="gptq"), "GPTQ's order of groups cannot be read"),
    "no method": (lambda c, t: c.pop("quant_method"), "quant_method is 'not given'"),
    "rotated": (lambda c, t: c.update(transform_config={"R1": {}}), "its weights are rotated"),
    "sparse": (lambda c, t: c.update(sparsity_config={"format": "sparse-24"}), "stored sparse"),
    "no groups": (lambda c, t: c.pop("config_groups"), "no config_groups"),
    "no scale": (lambda c, t: t.pop(f"{NAME}.weight_scale"), "has no .*weight_scale; the folder is incomplete"),
    "no global scale": (lambda c, t: t.pop(f"{NAME}.weight_global_scale"), "has no .*weight_global_scale"),
    "nothing quantized": (lambda c, t: t.clear() or t.update(a=torch.ones(2)), "none of its tensors is"),
    "ordered by activations": (lambda c, t: t.update({f"{NAME}.weight_g_idx": torch.ones(1)}), "weight_g_idx"),
    "not named": (
        lambda c, t: c["config_groups"]["group_0"].update(targets=["re:.*down_proj"]),
        "no group of quantization_config names it",
    ),
    "asymmetric float": (
        lambda c, t: c["config_groups"]["group_0"]["weights"].update(num_bits=6),
        r"not read here \(type float, num_bits 6",
    ),
}


@pytest.mark.parametrize("change, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_is_not_understood_is_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        damaged(change, tmp_path)


def test_a_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path):
    def spoil(config, tensors):
        tensors[f"{NAME}.weight_global_scale"] = torch.tensor([torch.nan])

    quantized = damaged(spoil, tmp_path)
    with pytest.raises(
        CheckpointError, match="global scale of nvfp4 is not a positive finite number; the folder is damaged"
    ):
        quantized.weights[f"{NAME}.weight"].read()


def test_codes_of_a_wrong_length_are_refused(tmp_path):
    def shorten(config, tensors):
        tensors[f"{NAME}.weight_scale"] = tensors[f"{NAME}.weight_scale"][:, :-1]

    with pytest.raises(CheckpointError, match=r"scales of nvfp4 is uint8 \[48, 15\]; a weight of \[48, 256\] needs"):
        damaged(shorten, tmp_path).weights[f"{NAME}.weight"].read()


def test_other_publishers_refusals(tmp_path):
    config, tensors = layouts.deepseek(NAME, weight())
    with pytest.raises(CheckpointError, match="the size cannot be seen in the shapes"):
        opened((config | {"weight_block_size": None}, tensors), tmp_path)
    config, tensors = layouts.bitsandbytes(NAME, weight())
    with pytest.raises(CheckpointError, match="another table than bitsandbytes ships"):
        opened((config, tensors | {f"{NAME}.weight.quant_map": torch.linspace(-1, 1, 16)}), tmp_path)
    with pytest.raises(CheckpointError, match=r"LLM\.int8"):
        opened((config | {"load_in_8bit": True}, tensors), tmp_path)
    config, tensors = layouts.modelopt(NAME, weight(), Integer(group=64))
    with pytest.raises(CheckpointError, match="scales the inputs of a quantized weight"):
        opened((config, tensors | {f"{NAME}.pre_quant_scale": torch.ones(256)}), tmp_path)


def test_powers_of_two_as_block_scales(tmp_path):
    config, tensors = layouts.deepseek(NAME, weight())
    powers = torch.full((1, 2), 120, dtype=torch.uint8)
    quantized = opened((config, tensors | {f"{NAME}.weight_scale_inv": powers}), tmp_path)
    decoded = quantized.weights[f"{NAME}.weight"].dense(torch.float32)
    assert torch.equal(decoded, tensors[f"{NAME}.weight"].float() * 2**-7)


def test_a_group_that_names_a_module_comes_before_the_one_of_all_linears(tmp_path):
    config, tensors = layouts.compressed_tensors(NAME, weight(), Integer(width=3, group=32))
    own = config["config_groups"]["group_0"] | {"targets": ["re:.*up_proj"]}
    every = {"targets": ["Linear"], "weights": own["weights"] | {"num_bits": 4}}
    config["config_groups"] = {"a": every, "b": own}
    check(opened((config, tensors), tmp_path), Integer(width=3, group=32), weight())
