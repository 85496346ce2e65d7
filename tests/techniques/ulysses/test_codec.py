"""The 8-bit codecs: declared bounds, rows that are not finite, the published e4m3 scheme, and outliers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.same import assert_same
from tests.techniques.ulysses.codec_sets import errors, outliers
from treering.core.errors import ConfigError, PlanError
from treering.techniques.ulysses.codec import ALIGNMENT, codec
from treering.techniques.ulysses.codec_kernels import compiled, hadamard, rotation_block

NAMES = ("e4m3", "int8")
R, H, D = 37, 3, 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(name, x, dtype=torch.float32):
    rows = codec(name)
    message = rows.encode(x)
    assert message.dtype == torch.uint8 and message.shape == (rows.size(*x.shape),)
    out = rows.decode(message, *x.shape, dtype=dtype)
    assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous()
    return out


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def channel_outliers():
    x = draw(R, H, D)
    x[..., 5] += 40
    return x


def token_outliers():
    x = draw(R, H, D)
    x[7] *= 1000
    return x


ROWS = {
    "normal": lambda: draw(R, H, D),
    "outlier channel": channel_outliers,
    "outlier token": token_outliers,
    "constant": lambda: torch.full((R, H, D), -2.5),
    "zero": lambda: torch.zeros(R, H, D),
    "1e-9": lambda: draw(R, H, D) * 1e-9,
    "1e-30": lambda: draw(R, H, D) * 1e-30,
    "1e+30": lambda: draw(R, H, D) * 1e30,
    "subnormal": lambda: draw(R, H, D) * 1e-40,
    "the smallest numbers": lambda: draw(R, H, D) * 1e-43,
    "the largest numbers": lambda: torch.full((R, H, D), torch.finfo(torch.float32).max) * draw(R, H, D).sign(),
    "one element": lambda: torch.eye(D)[:R, None].expand(R, H, D) * 3,
    "rows of every size": lambda: draw(R, H, D) * torch.logspace(-30, 30, R)[:, None, None],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ROWS)
def test_no_row_is_further_off_than_its_bound(name, case):
    x = ROWS[case]()
    error = (coded(name, x).double() - x.double()).norm(dim=-1)
    bound = codec(name).bound(x)
    assert error.isfinite().all() and (error <= bound).all(), float((error / bound).max())


@given(
    rows=st.integers(1, 9), heads=st.integers(1, 3), width=st.sampled_from([1, 2, 8, 24, 64, 80]),
    exponent=st.integers(-44, 37), offset=st.floats(-50, 50), seed=st.integers(0, 2**16), name=st.sampled_from(NAMES),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_bounds_hold_for_any_shape_and_size(rows, heads, width, exponent, offset, seed, name):
    x = (draw(rows, heads, width, seed=seed) + offset * (seed % 2)).clamp(-30, 30) * 10.0**exponent
    x = x.clamp(-3e38, 3e38)
    error = (coded(name, x).double() - x.double()).norm(dim=-1)
    assert (error <= codec(name).bound(x)).all()


@pytest.mark.parametrize(("name", "most"), [("e4m3", 0.03), ("int8", 0.01)])
@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e30])
def test_small_rows_keep_their_precision_next_to_large_ones(name, most, size):
    x = draw(R, H, D) + 5
    x[3:9] = draw(6, H, D, seed=1) * size
    out = coded(name, x)
    assert relative(out[3:9], x[3:9]) <= most


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_stay_zero_next_to_others(name):
    x = draw(R, H, D) + 5
    x[[0, 4, 36], 1] = 0
    out = coded(name, x, torch.bfloat16)
    assert (out[[0, 4, 36], 1] == 0).all() and (out[1] != 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_is_nan_and_changes_no_other(name, value):
    x = draw(R, H, D) + 5
    without = x.clone()
    without[4, 1], x[4, 1] = 0, draw(D)
    x[4, 1, 17] = value
    out, clean = coded(name, x), coded(name, without[:, :, :])
    assert out[4, 1].isnan().all()
    others = torch.ones(R, H, dtype=torch.bool)
    others[4, 1] = False
    assert out[others].isfinite().all()
    bound = codec(name).bound(x)
    assert ((out - x).double().norm(dim=-1) <= bound)[others].all()
    assert_same(out[:, [0, 2]], clean[:, [0, 2]])  # other heads: bit for bit
    squares = codec(name).error(x)
    assert squares.isfinite().all() and 0 < float(squares[0] / squares[1]) < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_number_of_a_dtype_stays_finite(name, dtype):
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = torch.full((5, 2, 16), largest, dtype=dtype) * draw(5, 2, 16).sign().to(dtype)
    out = coded(name, x, dtype)
    assert out.isfinite().all() and relative(out, x) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_float64_beyond_float32_becomes_nan_or_zero(name):
    x = draw(R, H, D).double()
    x[1] *= 1e60
    x[2] *= 1e-60
    out = coded(name, x, torch.float64)
    assert out[1].isnan().all() and (out[2] == 0).all() and relative(out[3:], x[3:]) < 0.03


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_decodes_to_what_the_published_scheme_gives(dtype):
    """LightX2V: one float32 scale for each token and head, amax / 448, dequantized in float32 and cast."""
    x = (draw(R, H, D) * torch.logspace(-2, 4, R)[:, None, None]).to(dtype)  # above its least scale
    scale = x.float().abs().amax(-1, keepdim=True) / torch.tensor(448.0)
    codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert_same(coded("e4m3", x, dtype), (codes.float() * scale).to(dtype))
    message = codec("e4m3").encode(x)
    assert torch.equal(message[: x.numel()], codes.view(torch.uint8).flatten())
    start = -(-x.numel() // ALIGNMENT) * ALIGNMENT
    assert torch.equal(message[start : start + 4 * R * H].view(torch.float32), scale.flatten())


@pytest.mark.parametrize("width", [8, 24, 64, 80, 128])
def test_int8_decodes_to_its_formula_in_float64(width):
    x = draw(R, 2, width) + 3
    rows = codec("int8")
    codes, scales, means = rows._views(rows.encode(x), *x.shape)
    matrix = hadamard(width, torch.device("cpu")).double()
    assert torch.equal(matrix @ matrix.T, rotation_block(width) * torch.eye(width, dtype=torch.float64))
    y = codes.view(torch.int8).double() * scales.abs().double() + means.double() * (scales > 0)
    assert_same(rows.decode(rows.encode(x), *x.shape, dtype=torch.float64), y @ matrix, 1e-6)


@pytest.mark.parametrize("kind", ["channels", "tokens"])
def test_int8_is_three_times_closer_than_e4m3_on_outliers(kind):
    found = {}
    for name in NAMES:
        code = lambda x, name=name: coded(name, x)  # noqa: E731
        found[name] = errors(outliers(kind), [code] * 3), errors(outliers(kind), [code] * 4, code)
    for ours, other in zip(found["int8"], found["e4m3"]):
        assert all(3 * ours[key] <= other[key] for key in ours), (ours, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_strided_view_and_a_given_buffer_give_the_same_message(name):
    rows, x = codec(name), draw(2, 7, R, D).to(torch.bfloat16)
    view = x[1, 2:5].transpose(0, 1)  # R × H × D, as attention layers have it
    size = rows.size(R, 3, D)
    buffer = torch.full((2 * size,), 255, dtype=torch.uint8)
    out = rows.encode(view, buffer[size:])
    assert out.data_ptr() == buffer[size:].data_ptr() and (buffer[:size] == 255).all()
    assert torch.equal(out, rows.encode(view.contiguous())) and size % ALIGNMENT == 0
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), out])[1:]
    assert torch.equal(rows.decode(shifted, R, 3, D, torch.bfloat16), rows.decode(out, R, 3, D, torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 16), (5, 0, 16)])
def test_a_block_without_elements_has_no_message(name, shape):
    assert codec(name).size(*shape) == 0
    assert coded(name, torch.empty(shape)).numel() == 0


def test_a_message_has_one_byte_an_element_scales_and_means():
    assert codec("e4m3").size(1024, 8, 128) == 1024 * 8 * (128 + 4)
    assert codec("int8").size(1024, 8, 128) == 1024 * 8 * (128 + 4) + 2 * 8 * 128


@pytest.mark.parametrize("name", NAMES)
def test_shapes_suffice_where_memory_is_planned(name):
    with FakeTensorMode():
        x = torch.empty(R, H, D, dtype=torch.bfloat16)
        assert coded(name, x, torch.bfloat16).shape == x.shape
        assert codec(name).error(x).shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_gradients_change_nothing(name):
    x = draw(R, H, D)
    wanted = coded(name, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coded(name, x.requires_grad_())
    assert not found.requires_grad
    assert_same(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_the_measured_error_is_that_of_the_decoded_block(name):
    x = draw(R, H, D).to(torch.bfloat16)
    wrong, total = codec(name).error(x, codec(name).encode(x)).tolist()
    assert (wrong / total) ** 0.5 == pytest.approx(relative(coded(name, x), x), rel=1e-6)


@pytest.mark.parametrize("width", [3, 12, 65, 100])
def test_int8_refuses_a_width_without_a_power_of_two(width):
    with pytest.raises(PlanError, match=rf"heads of {width} .*e4m3, or none"):
        codec("int8").size(4, 2, width)
    assert codec("e4m3").size(4, 2, width) > 0


def test_codecs_are_found_by_name():
    assert codec("none") is None and [codec(name).name for name in NAMES] == list(NAMES)
    with pytest.raises(ConfigError, match="none, e4m3, int8"):
        codec("int4")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_give_what_plain_torch_gives(name, monkeypatch):
    from treering.techniques.ulysses import codec as module

    x = draw(R, H, D).to(torch.bfloat16)
    wanted = coded(name, x, torch.bfloat16)
    monkeypatch.setattr(module, "run", lambda function, *rest: compiled(function)(*rest))
    for rows in (R, 2 * R, 5):
        found = coded(name, torch.cat([x, x])[:rows], torch.bfloat16)
        assert relative(found, torch.cat([x, x])[:rows]) < 0.03
    assert relative(coded(name, x, torch.bfloat16), wanted) < 1e-3
