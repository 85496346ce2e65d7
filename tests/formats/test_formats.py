"""Number formats against the bytes of the libraries of the field, against one weight at a time, and with bad input."""

import json

import pytest
import torch
from safetensors import safe_open

from tests.formats.libraries import GOLDEN, digest
from tests.formats.weights import cases
from treering import formats
from treering.core.errors import ConfigError
from treering.formats import FP8, MXFP4, NAMED, NF4, NVFP4, FP8Block, Integer, reference
from treering.formats.bits import as_bytes, pack_stream, unpack_stream
from treering.formats.e2m1 import e8m0_values
from treering.formats.nf4 import TABLE, nested_map
from treering.formats.search import best_clip

FORMS = {
    "int8": Integer(width=8, group=0),
    "int8 of a matrix": Integer(width=8, group=-1),
    "int4": Integer(width=4, group=128),
    "int3, zero points": Integer(width=3, group=32, asymmetric=True),
    "int5": Integer(width=5, group=64),
    "fp8": FP8(),
    "fp8 of a matrix": FP8(scale="tensor"),
    "fp8_block": FP8Block(),
    "nf4": NF4(),
    "nf4, plain scales": NF4(nested=False),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "nvfp4, multiply": NVFP4(convention="multiply"),
}
form_each = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
# The largest distance of a decoded weight, as a share of the largest weight of its group.
STEP = {"integer 8": 1 / 127, "integer 5": 1 / 15, "integer 4": 1 / 7, "integer 3": 1 / 3}
STEP |= {"fp8": 1 / 16, "fp8_block": 1 / 16, "nf4": 0.16, "mxfp4": 1 / 3, "nvfp4": 0.2}


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
        return {key: file.get_tensor(key) for key in list(file.keys())}, json.loads(metadata["cases"])


def test_bytes_are_those_of_the_libraries(golden):
    tensors, described = golden
    assert {case["library"] for case in described.values()} == {"compressed-tensors", "torchao", "bitsandbytes"}
    for key, case in described.items():
        form, weight = formats.from_settings(case["form"]), tensors[case["weight"]]
        theirs = {name.split(".")[1]: t for name, t in tensors.items() if name.startswith(f"{key}.")}
        assert form.problem(theirs, tuple(weight.shape)) == ""
        decoded = form.decode(theirs, weight.shape[-1], getattr(torch, case["dtype"].removeprefix("torch.")))
        assert digest(decoded) == case["decoded"], case
        ours = form.encode(weight)
        if case["library"] == "bitsandbytes" and form.nested:
            # Its CPU code looks 8-bit scales up in 65,536 bins; ours, as its CUDA code, takes the nearest.
            other = (ours.pop("scales") != theirs.pop("scales")).float().mean().item()
            assert other <= 0.1
        assert all(torch.equal(t, theirs[name]) for name, t in ours.items()), case


@form_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoded_weight_is_within_a_step_of_the_weight(form, dtype):
    for name, weight in cases(dtype).items():
        packed = form.encode(weight)
        assert form.problem(packed, tuple(weight.shape)) == "", name
        decoded = form.decode(packed, weight.shape[-1], torch.float32)
        assert decoded.isfinite().all()
        if name in {"blocks", "heavy"} and isinstance(form, NF4) and form.nested:
            continue  # scales of very different size, of which the nested map keeps the large ones
        largest = weight.float().abs()
        largest = largest.amax() if form.groups(*weight.shape)[0] == 1 else largest.amax(-1, keepdim=True)
        step = STEP[f"{form.name} {form.width}" if isinstance(form, Integer) else form.name]
        assert ((decoded - weight.float()).abs() <= step * largest + 1e-6).all(), name


@form_each
def test_experts_of_a_stack_are_encoded_alone(form):
    weights = torch.stack([*cases(torch.float32).values()]) * torch.tensor([1, 100, 1e-3, 1, 1, 1])[:, None, None]
    stack = form.encode(weights)
    assert form.problem(stack, tuple(weights.shape)) == ""
    decoded = form.decode(stack, weights.shape[-1], torch.float32)
    for e, weight in enumerate(weights):
        one = form.encode(weight)
        assert all(torch.equal(stack[key][e], t) for key, t in one.items())
        assert torch.equal(decoded[e], form.decode(one, weight.shape[-1], torch.float32))


@form_each
def test_rows_may_be_cut_anywhere(form):
    weight = cases(torch.float32)["heavy"]
    packed, pieces = form.encode(weight), form.pieces(*weight.shape)
    decoded = form.decode(packed, weight.shape[-1], torch.float32)
    if isinstance(form, FP8Block) or not any(piece.by_rows for piece in pieces.values()):
        return
    for start, stop in ((0, 5), (5, 6), (6, 16)):
        part = {key: t[start:stop] if pieces[key].by_rows else t for key, t in packed.items()}
        if isinstance(form, NF4) and form.nested:
            continue  # its nested scales belong to blocks counted over the whole matrix
        assert torch.equal(form.decode(part, weight.shape[-1], torch.float32), decoded[start:stop])


def test_single_weights_in_plain_floats():
    weight = cases(torch.float32)["heavy"]
    rows = [(i, j) for i in range(len(weight)) for j in range(0, weight.shape[1], 7)]
    zeros = Integer(width=3, group=32, asymmetric=True)
    sides = {
        MXFP4(): reference.mxfp4,
        NVFP4(): reference.nvfp4,
        NVFP4(convention="multiply"): lambda t, i, j: reference.nvfp4(t, i, j, multiply=True),
        zeros: lambda t, i, j: reference.integer(t, i, j, width=3, group=32),
        Integer(width=5, group=64): lambda t, i, j: reference.integer(t, i, j, width=5, group=64),
        FP8Block(block=8): lambda t, i, j: reference.fp8_block(t, i, j, block=8),
    }
    for form, value in sides.items():
        packed = form.encode(weight)
        decoded = form.decode(packed, weight.shape[-1], torch.float32)
        for i, j in rows:
            expected = torch.tensor(value(packed, i, j), dtype=torch.float32)
            assert decoded[i, j] == expected, (form, i, j)


def test_two_global_scales_of_a_matrix_serve_their_own_rows():
    top, bottom = (NVFP4().encode(w) for w in (torch.randn(4, 32), 1000 * torch.randn(4, 32)))
    both = {key: torch.cat([top[key], bottom[key]]) for key in top}
    decoded = NVFP4(parts=2).decode(both, 32, torch.float32)
    assert torch.equal(decoded[:4], NVFP4().decode(top, 32, torch.float32))
    assert torch.equal(decoded[4:], NVFP4().decode(bottom, 32, torch.float32))
    assert reference.nvfp4(both, 5, 3, parts=2) == decoded[5, 3]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33, 96])
def test_bit_streams(bits, columns):
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8)
    packed = pack_stream(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 32) * 4)
    assert torch.equal(unpack_stream(packed, bits, columns), codes)
    assert all(reference.bits_at(packed[1], bits * j, bits) == codes[1, j] for j in range(columns))


def test_tables():
    assert [reference.e4m3(b) for b in range(127)] == torch.arange(127).byte().view(torch.float8_e4m3fn).tolist()
    assert e8m0_values(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist() == [2**-127, 2**-126, 1, 2**127]
    assert len(nested_map()) == 256 and len(TABLE) == 16 and list(nested_map()) == sorted(set(nested_map()))


def test_stored_bits_of_a_weight():
    bits = {name: formats.named(name).bits(2048, 768) for name in NAMED}
    assert bits["nvfp4"] <= 4.51 and bits["mxfp4"] == 4.25 and bits["nf4"] <= 4.13 and bits["fp8_block"] <= 8.01
    for name, per_weight in bits.items():
        packed = formats.named(name).encode(torch.randn(256, 768))
        assert 8 * sum(t.numel() for t in packed.values()) / (256 * 768) == pytest.approx(per_weight, rel=0.02)


@form_each
def test_clips_lower_the_error_of_every_group(form):
    weight = cases(torch.float32)["heavy"]
    importance = torch.rand(weight.shape[-1])
    clip = best_clip(form, weight, importance)
    assert clip.shape == form.groups(*weight.shape)
    error = [
        ((form.decode(form.encode(weight, clip=c), 256, torch.float32) - weight).square() * importance).sum()
        for c in (1.0, clip)
    ]
    assert error[1] <= error[0]


@form_each
def test_tensors_that_are_no_weight_are_named(form):
    weight = cases(torch.float32)["normal"]
    packed = form.encode(weight)
    shape = tuple(weight.shape)
    assert "codes" in form.problem(packed | {"codes": packed["codes"][:, :-1]}, shape)
    assert "missing: " in form.problem({"codes": packed["codes"]}, shape)
    assert "does not know: bias" in form.problem(packed | {"bias": packed["codes"]}, shape)
    assert "uint8" in form.problem(packed | {"codes": packed["codes"].float()}, shape)
    bad = dict(packed)
    key = "nested" if "nested" in packed else "scales"
    size = {"nvfp4": 1, "mxfp4": 1}.get(form.name, 4)
    bad[key] = packed[key].clone()
    bad[key][0, :size] = 255 if size == 1 else as_bytes(torch.tensor([torch.nan]))
    assert "NaN" in form.problem(bad, shape) or "not finite" in form.problem(bad, shape)


def test_shapes_that_do_not_fit_say_so():
    assert "multiple of 32" in MXFP4().refusal(4, 40)
    assert "multiple of 16" in NVFP4().refusal(4, 40)
    assert "parts" in NVFP4(parts=2).refusal(3, 32)
    assert "multiple of 64" in NF4().refusal(4, 96)
    assert "multiple of 128" in Integer().refusal(4, 64) and Integer(group=0).refusal(4, 7) == ""
    assert FP8Block().refusal(3, 5) == ""


def test_settings_come_back_and_unknown_ones_are_refused():
    for form in FORMS.values():
        assert formats.from_settings(json.loads(json.dumps(form.settings()))) == form
    with pytest.raises(ConfigError, match="'int9' is no number format; there are int8, int4"):
        formats.named("int9")
    with pytest.raises(ConfigError, match=r"number format nf4: .*group"):
        formats.named("nf4", group=3)
    with pytest.raises(ConfigError, match="no stored number format"):
        formats.from_settings({"format": "gguf"})


def test_a_slice_that_starts_between_words_is_read():
    packed = FP8Block(block=8).encode(torch.randn(3, 16, 16))
    bytes_ = torch.cat([torch.zeros(1, dtype=torch.uint8), packed["scales"].flatten()])[1:]
    shifted = packed | {"scales": bytes_.view(packed["scales"].shape)}
    decoded = [FP8Block(block=8).decode(t, 16, torch.float32) for t in (packed, shifted)]
    assert torch.equal(*decoded)


def test_the_map_of_nested_scales_is_the_one_of_the_library_whatever_is_traced_around_it():
    """It is kept: computed where tensors have no values, it would be wrong for the rest of the process."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-m for m in middles]
    nested_map.cache_clear()
    with torch.device("meta"):
        assert nested_map() == tuple(sorted(values))
