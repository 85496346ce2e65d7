"""8-bit rows: errors within their declared bounds on any values, and int8 closer than e4m3 where channels are large."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import treering as tr
from tests.same import assert_same
from treering.attention import Documents
from treering.attention.reference import reference
from treering.core.seeds import generator
from treering.techniques.ulysses.codec import codec

ROWS, HEADS, WIDTH = 37, 3, 32
CODECS = ("e4m3", "int8")


def gauss(name, *shape):
    return torch.randn(*shape, generator=generator(0, "codec", name))


def values():
    """Rows of every size and kind."""
    x = gauss("x", ROWS, HEADS, WIDTH)
    channel, token = x.clone(), x.clone()
    channel[..., 5] += 60.0
    token[3] *= 300.0
    return {
        "normal": x,
        "a large channel": channel,
        "a large token": token,
        "constant": torch.full_like(x, -2.7),
        "zero": torch.zeros_like(x),
        "one row": torch.cat([x[:1], torch.zeros_like(x[1:])]),
        "gradients": 1e-9 * x,
        "tiny": 1e-30 * x,
        "subnormal": 1e-40 * x,
        "huge": 1e30 * x,
        "of all sizes": x * 10.0 ** torch.linspace(-37, 37, ROWS)[:, None, None],
        "bfloat16": x.bfloat16(),
        "double": x.double(),
    }


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", values())
def test_errors_of_rows_are_within_the_bound(name, kind):
    x, rows = values()[kind], codec(name)
    message = rows.encode(x)
    assert message.dtype == torch.uint8 and message.numel() == rows.size(*x.shape) and message.numel() % 16 == 0
    found = rows.decode(message, *x.shape, torch.float64)
    error = (found - x.double()).norm(dim=-1)
    bound = rows.bound(x)
    assert bool((error <= bound).all()), f"{float((error / bound).max())} of the bound"
    if kind in ("normal", "gradients", "tiny", "huge", "of all sizes"):
        relative = (error / x.double().norm(dim=-1)).mean()  # of rows of every size alike
        assert relative < {"e4m3": 0.03, "int8": 0.01}[name]
    if kind == "zero":
        assert not found.any()
    if kind == "one row":
        assert not found[1:].any()
    squares = rows.error(x, message)
    assert_same(squares[0].sqrt(), (found.float() - x.float()).double().norm(), 1e-6)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_changes_no_other(name, bad):
    x, rows = values()["a large channel"], codec(name)
    wanted = rows.decode(rows.encode(x), *x.shape, torch.float32)
    broken = x.clone()
    broken[4, 1, 7] = bad
    found = rows.decode(rows.encode(broken), *x.shape, torch.float32)
    assert found[4, 1].isnan().all()
    others = torch.ones(ROWS, HEADS, dtype=torch.bool)
    others[4, 1] = False
    assert_same(found[others], wanted[others], 0.01)
    assert found[others].isfinite().all()


def test_e4m3_is_what_lightx2v_sends():
    """One float32 scale a token and head, the largest / 448, and torch's own conversion."""
    x = values()["a large token"]
    scale = x.abs().amax(-1, keepdim=True) / 448
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    rows = codec("e4m3")
    message = rows.encode(x)
    assert torch.equal(message[: x.numel()].view(x.shape), codes.view(torch.uint8))
    scales = message[-(-x.numel() // 16) * 16 :][: 4 * ROWS * HEADS].view(torch.float32).view(ROWS, HEADS, 1)
    assert_same(scales, scale, 1e-7)
    assert torch.equal(rows.decode(message, *x.shape, torch.float32), codes.float() * scales)


@pytest.mark.parametrize("name", CODECS)
def test_views_and_places_in_a_buffer(name):
    rows, x = codec(name), gauss("view", 2, HEADS, ROWS, WIDTH)
    view = x[1].transpose(0, 1)[:, 1:]
    message = rows.encode(view)
    assert torch.equal(message, rows.encode(view.contiguous()))
    buffer = torch.full((3 * message.numel(),), 7, dtype=torch.uint8)
    rows.encode(view, out=buffer[message.numel() : 2 * message.numel()])
    assert torch.equal(buffer[message.numel() : -message.numel()], message)
    assert rows.size(5, 0, WIDTH) == rows.encode(x[0].transpose(0, 1)[:, :0]).numel() == 0
    for dtype in (torch.float16, torch.bfloat16):
        assert rows.decode(message, *view.shape, dtype).dtype == dtype


@pytest.mark.parametrize("name", CODECS)
def test_shapes_alone_are_enough(name):
    with FakeTensorMode():
        x = torch.empty(ROWS, HEADS, WIDTH, dtype=torch.bfloat16)
        message = codec(name).encode(x)
        assert codec(name).decode(message, *x.shape, x.dtype).shape == x.shape


def test_widths_without_a_power_of_two_are_refused():
    for width in (8, 24, 40, 64, 96, 4, 1):
        codec("int8").size(3, 2, width)
    with pytest.raises(tr.PlanError, match=r"heads of 20 are no multiple of it; set ulysses\.codec: e4m3"):
        codec("int8").size(3, 2, 20)
    assert codec("none") is None and codec("e4m3").size(3, 2, 20) == 128 + 32
    with pytest.raises(tr.ConfigError, match="is no codec; there are none, e4m3, int8"):
        codec("int4")


def outliers(kind, heads=2, tokens=256, width=64):
    """q, k, v of 4 shards with constant offsets in channels; `tokens`: also large rows, as of a first token."""
    query, key, value = (gauss(f"{kind} {name}", 1, heads, tokens, width) for name in "qkv")
    for x, size, channels in ((key, 10.0, (3, 17, 40)), (query, 4.0, (3, 20))):
        x[..., list(channels)] += size * gauss(f"{kind} sign {size}", heads, 1, len(channels)).sign()
    value[..., 7] *= 6
    if kind == "tokens":
        value[:, :, ::37] *= 20
        query[:, :, ::53] *= 8
    return query, key, value


def through(rows, x):
    """Every shard of 64 tokens coded by itself."""
    shards = [part[0].transpose(0, 1) for part in x.split(64, dim=2)]
    decoded = [rows.decode(rows.encode(s), *s.shape, torch.float64) for s in shards]
    return torch.cat(decoded).transpose(0, 1)[None]


def attention_errors(kind, name):
    """Of the output with coded q, k, v, and of gradients with these and the output's gradient coded as well."""
    rows, tensors = codec(name), outliers(kind)
    gradient = gauss(f"{kind} gradient", *tensors[2].shape).double()
    results = []
    for coded in (False, True):
        q, k, v = ((through(rows, x) if coded else x.double()).requires_grad_() for x in tensors)
        out = reference(q, k, v, Documents.of([q.shape[2]]))
        out.backward(through(rows, gradient) if coded else gradient)
        results.append([out.detach(), *(through(rows, x.grad) if coded else x.grad for x in (q, k, v))])
    return [float((found - wanted).norm() / wanted.norm()) for wanted, found in zip(*results)]


@pytest.mark.parametrize("kind", ["channels", "tokens"])
def test_int8_is_three_times_closer_than_e4m3_where_channels_are_large(kind):
    close, coarse = attention_errors(kind, "int8"), attention_errors(kind, "e4m3")
    assert close[0] * 3 <= coarse[0], (close, coarse)
    assert all(one * 3 <= other for one, other in zip(close[1:], coarse[1:])), (close, coarse)
