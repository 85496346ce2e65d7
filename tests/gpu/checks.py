"""What must hold on a CUDA card, as plain functions of a device: pytest runs them, and so does `benchmarks.gpu`.

Each raises AssertionError where it does not hold. On a CPU they run as well and prove less: the device that is compared
with the CPU is then the CPU. Nothing here needs pytest, so that a machine without it can run the checks.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import treering as tr
from benchmarks.gpu.device import deterministic
from tests.same import assert_all_same, assert_same
from tests.techniques.osft.measured import moments
from tests.toy import gradients, packed, rows, train, weights
from tests.zoo import build
from treering import formats
from treering.attention import Documents, attend
from treering.core import full_precision, philox
from treering.experts import products
from treering.plan import draft
from treering.plan.compose import load

Check = Callable[[torch.device], None]
LENGTHS = (5, 1, 70, 13, 1, 30)
ACROSS = 1e-4  # of a change, between two kinds of device

LORA = tr.LoRA(rank=4, dtype="float64")
TILES = (tr.TiledLoss(tile=5), tr.TiledBlock(tile=5))
OFFLOAD = tr.Recompute(offload="cpu")
COMPOSITIONS: dict[str, tuple[Any, ...]] = {
    "full": (tr.Full(),),
    "lora": (LORA,),
    "lora (pissa)": (replace(LORA, init="pissa"),),
    "osft": (tr.OSFT(),),
    "osft (hard)": (tr.OSFT(strength="hard", ratio=0.5),),
    "osft (update)": (tr.OSFT(form="update"),),
    "osft (update, hard)": (tr.OSFT(form="update", strength="hard", ratio=0.5),),
    "osft (one_sided)": (tr.OSFT(form="one_sided", ratio=0.5),),
    "osft (core)": (tr.OSFT(protect="weights", form="core", ratio=0.4),),
    "osft (forward)": (tr.OSFT(protect="weights", form="forward", ratio=0.4),),
    "osft (factors)": (tr.OSFT(protect="weights", form="factors", ratio=0.4),),
    "tiledmlp": (tr.Full(), tr.TiledMLP(tile=5)),
    "tiledblock": (tr.Full(), tr.TiledBlock(tile=5)),
    "tiledloss": (tr.Full(), tr.TiledLoss(tile=5)),
    "recompute": (tr.Full(), tr.Recompute()),
    "offload": (tr.Full(), OFFLOAD),
    "all with lora": (LORA, *TILES, OFFLOAD),
    "all with osft": (tr.OSFT(), *TILES, OFFLOAD),
    "quantized": (tr.Quantize(format="int4", group=8), LORA),
    "quantized, all with lora": (
        tr.Quantize(format="mxfp4", targets=("q_proj", "o_proj", "up_proj")),
        LORA,
        *TILES,
        OFFLOAD,
    ),
}
SHARDED: dict[str, tuple[Any, ...]] = {
    "full": (tr.Full(), tr.Shard()),
    "offloaded": (tr.Full(), tr.Shard(offload="cpu")),
    "osft": (tr.OSFT(), tr.Shard()),
    "osft (offloaded)": (tr.OSFT(), tr.Shard(offload="cpu")),
    "osft (update)": (tr.OSFT(form="update"), tr.Shard()),
    "osft (cached)": (tr.OSFT(form="update", communication="cached"), tr.Shard()),
    "all with lora": (LORA, *TILES, OFFLOAD, tr.Shard()),
}


def composed(techniques: Iterable[Any], device: torch.device, architecture: str = "llama", **more: Any) -> Any:
    """`tr.compose` of a toy in float64, on a device of the caller's choice."""
    model = build(architecture).double()
    measured = [t for t in techniques if isinstance(t, tr.OSFT) and t.measured]
    statistics = moments(model, measured[0]) if measured else None
    plan = draft(model, techniques, statistics=statistics, **more)
    return load(replace(plan, device=device), statistics=statistics)


def changes(techniques: Iterable[Any], device: torch.device, architecture: str = "llama") -> dict[str, Tensor]:
    """What three steps, of rows and of packed documents, add to each plain weight."""
    run = composed(techniques, device, architecture)
    before = weights(run)
    train(run, [rows(2), [packed((7, 5, 12))], rows(1)], lr=0.1)
    return {name: (value - before[name]).cpu() for name, value in weights(run).items()}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Norms and rotary angles are in float32 whatever the model's dtype, and devices round those differently.

    Relative to the largest change of the tensor; where that is next to nothing beside others, to a part of theirs.
    """
    assert found.keys() == wanted.keys()
    largest = max(float(change.abs().max()) for change in wanted.values())
    assert largest > 0, "nothing was trained"
    for name, change in wanted.items():
        scale = max(float(change.abs().max()), 1e-3 * largest)
        error = float((found[name] - change).abs().max()) / scale
        assert error <= ACROSS, f"{name}: its change differs by {error:.1e} of the largest"


def equals_the_cpu(name: str, device: torch.device) -> None:
    """Three steps of training change the weights as they do on the CPU."""
    techniques = COMPOSITIONS[name]
    assert_alike(changes(techniques, device), changes(techniques, torch.device("cpu")))


def architecture_equals_the_cpu(architecture: str, device: torch.device) -> None:
    """So do models with windows, softcaps, sinks, experts and unequal widths of queries and values."""
    found, wanted = (changes([tr.Full()], where, architecture) for where in (device, torch.device("cpu")))
    assert_alike(found, wanted)


def sharding_changes_nothing(name: str, device: torch.device) -> None:
    """One rank of FSDP2, on NCCL or gloo, trains as no sharding does."""
    with_shard = SHARDED[name]
    alone = [t for t in with_shard if not isinstance(t, tr.Shard)]
    assert_all_same(changes(with_shard, device), changes(alone, device), 1e-9)


def offload_keeps_every_bit(device: torch.device) -> None:
    """Gradients with block inputs in host memory are those without, to the last bit; the memory is given back."""
    with deterministic():
        for batches in (rows(3), [packed((7, 5, 4))]):
            wanted = gradients(composed([tr.Full(), tr.Recompute()], device), batches)
            run = composed([tr.Full(), OFFLOAD], device)
            assert_all_same(gradients(run, batches), wanted)
            engine = run.model.model.layers[0].forward.engine
            assert engine.sent and engine.pool.used == 0 and engine.pool.pinned == (device.type == "cuda")


def copies_are_never_mixed_up(device: torch.device) -> None:
    """Copies that take longer than blocks: without the right waits, some of many would come back as others."""
    from tests.techniques.recompute.stacks import stack
    from treering.techniques.recompute.offload import Offload

    tokens, repeats = (400_000, 20) if device.type == "cuda" else (100, 2)
    blocks = stack(12, Offload(tuple(f"b{i}" for i in range(12)))).to(device)
    plain = stack(12, plain=True).to(device)
    for seed in range(repeats):
        draw = torch.Generator(device).manual_seed(seed)
        x = torch.randn(1, tokens, 8, device=device, generator=draw)
        found = []
        for some in (plain, blocks):
            y = leaf = x.clone().requires_grad_()
            for block in some:
                y = block(y)
            y.square().sum().backward()
            found.append(leaf.grad)
        assert torch.equal(*found), f"input {seed} came back as something else"


def offload_holds_two_inputs(device: torch.device) -> None:
    """More blocks take no more memory of the device. Only a card can tell."""
    from tests.techniques.recompute.stacks import stack
    from treering.techniques.recompute.offload import Offload

    peaks: dict[int, int] = {}
    x = torch.randn(1, 400_000 if device.type == "cuda" else 100, 8, device=device)
    for count in (6, 18):
        blocks = stack(count, Offload(tuple(f"b{i}" for i in range(count)))).to(device)
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            y = x.clone().requires_grad_()
            for block in blocks:
                y = block(y)
            y.sum().backward()
        peaks[count] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    more = peaks[18] - peaks[6]
    assert more < x.numel() * 4, f"twelve more blocks took {more} bytes more, and an input has {x.numel() * 4}"


def protection_withstands_tf32_and_autocast(device: torch.device) -> None:
    """Products that project are exact, whatever precision the program allows for others."""
    model = build("llama")
    technique = tr.OSFT(strength="hard", ratio=0.5, keep_initial=True)
    statistics = moments(model, technique)
    plan = draft(model, [technique], statistics=statistics)
    run = load(replace(plan, device=device), statistics=statistics)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            train(run, [rows(2)] * 3, lr=0.1)
            leak = run.metrics()["osft/leak"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert leak < 1e-5, f"{leak:.1e} of the change lies in protected directions"


def statistics_equal_those_of_the_cpu(device: torch.device) -> None:
    """Second moments of the inputs, measured on the device."""
    batches = [{"input_ids": batch["input_ids"]} for batch in rows(3)]
    found, wanted = (tr.measure(build("qwen3").to(where), batches) for where in (device, torch.device("cpu")))
    for name in wanted:
        assert_same(found[name]["inputs"].cpu(), wanted[name]["inputs"].cpu(), 1e-5, name)


def documents_leave_no_trace(window: int | None, sinks: bool, device: torch.device) -> None:
    """Changing one packed document leaves every bit of the others' attention as it was."""
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(LENGTHS), 64, generator=draw, device=device, dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    )
    documents = Documents.of(LENGTHS, device)
    sinks_H = torch.zeros(4, device=device) if sinks else None
    before = attend(query, key, value, documents, window=window, sinks_H=sinks_H)
    for x in (query, key, value):
        x[:, :, :6] += 1
    after = attend(query, key, value, documents, window=window, sinks_H=sinks_H)
    assert torch.equal(after[:, :, 6:], before[:, :, 6:])


def formats_write_the_bytes_of_the_cpu(name: str, device: torch.device) -> None:
    """Codes and scales of a matrix and of a stack, and what they decode to, bit for bit."""
    draw, form = torch.Generator().manual_seed(0), formats.named(name)
    for shape, dtype in (((128, 256), torch.bfloat16), ((3, 128, 256), torch.float32)):
        W = torch.randn(shape, generator=draw).to(dtype)
        wanted, found = form.encode(W), form.encode(W.to(device))
        for key, value in wanted.items():
            assert torch.equal(found[key].cpu(), value), f"{key} of {name}, {list(shape)}"
        again = form.decode(found, shape[-1], torch.bfloat16).cpu()
        assert torch.equal(again, form.decode(wanted, shape[-1], torch.bfloat16)), f"{name} decoded"


def products_of_experts_equal_float64(dtype: torch.dtype, device: torch.device) -> None:
    """Grouped products and adapters of every rank, with experts that have no rows, few rows and most rows."""
    draw = torch.Generator().manual_seed(0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4  # float32 may be rounded to TF32 where a program allows it
    for counts in ((5, 0, 120, 3), (0, 0, 64, 0), (1, 1, 1, 1)):
        offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
        rows_ = int(offsets[-1])
        for rank in (1, 3, 8, 16):
            shapes = (rows_, 64), (4, 48, 64), (4, rank, 64), (4, 48, rank), (rows_, 48)
            x, W, A, B, g = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
            found = _expert_passes([t.to(device, dtype) for t in (x, W, A, B, g)], offsets.to(device))
            wanted = _expert_passes([t.double() for t in (x, W, A, B, g)], offsets)
            for what, a, b in zip(("y", "x", "W", "A", "B"), found, wanted, strict=True):
                assert_same(a.cpu().double(), b, tolerance, f"{what}, rows {counts}, rank {rank}")


def _expert_passes(given: list[Tensor], offsets: Tensor) -> tuple[Tensor, ...]:
    *leaves, incoming = given
    x, W, A, B = (leaf.requires_grad_() for leaf in leaves)
    y = products.stack_product(x, W, offsets) + products.low_rank(x, A, B, offsets, 0.5)
    return y.detach(), *torch.autograd.grad(y, [x, W, A, B], incoming)


def products_in_parts_are_nearly_exact(device: torch.device) -> None:
    """Float32 products of operators, and their gradients, beside float64."""
    draw = torch.Generator().manual_seed(0)
    for shape, other in (((300, 512), (512, 128)), ((3, 40, 64), (3, 64, 24))):
        a, b = (torch.randn(s, generator=draw) for s in (shape, other))
        for dtype in (torch.float32, torch.bfloat16):
            pair = [a.to(dtype).to(device).requires_grad_(), b.to(device).requires_grad_()]
            exact = [t.detach().cpu().double().requires_grad_() for t in pair]
            g = torch.randn(*shape[:-1], other[-1], generator=draw)
            y, wanted = full_precision.product(*pair), exact[0] @ exact[1]
            found = [y, *torch.autograd.grad(y, pair, g.to(device))]
            for one, exactly in zip(found, [wanted, *torch.autograd.grad(wanted, exact, g.double())], strict=True):
                error = float((one.detach().cpu().double() - exactly.detach()).norm() / exactly.detach().norm())
                assert error < (2**-15 if one.dtype == torch.float32 else 2**-8), f"{list(shape)}, {dtype}: {error:.1e}"


def random_numbers_are_those_of_the_cpu(device: torch.device) -> None:
    rows_ = torch.tensor([0, 7, 1 << 40])
    wanted = philox.words(philox.key(3, "a"), rows_, 9)
    assert torch.equal(philox.words(philox.key(3, "a"), rows_.to(device), 9).cpu(), wanted)


ARCHITECTURES = ("qwen3_moe", "mistral", "gemma3", "gpt_oss", "deepseek_v3")
ALONE: dict[str, Check] = {
    **{f"{name}: equals the CPU": partial(equals_the_cpu, name) for name in COMPOSITIONS},
    **{f"{name}: equals the CPU": partial(architecture_equals_the_cpu, name) for name in ARCHITECTURES},
    **{f"{name}: the bytes of the CPU": partial(formats_write_the_bytes_of_the_cpu, name) for name in formats.NAMED},
    "experts, bfloat16: equal float64": partial(products_of_experts_equal_float64, torch.bfloat16),
    "experts, float32: equal float64": partial(products_of_experts_equal_float64, torch.float32),
    "products in parts: nearly exact": products_in_parts_are_nearly_exact,
    "philox: the numbers of the CPU": random_numbers_are_those_of_the_cpu,
    "offload: every bit": offload_keeps_every_bit,
    "offload: no copy mixed up": copies_are_never_mixed_up,
    "offload: two inputs on the device": offload_holds_two_inputs,
    "osft: exact under TF32 and autocast": protection_withstands_tf32_and_autocast,
    "measure: equals the CPU": statistics_equal_those_of_the_cpu,
    "attention: documents leave no trace": partial(documents_leave_no_trace, None, False),
    "attention: documents leave no trace (window, sinks)": partial(documents_leave_no_trace, 8, True),
}
# These make a process group, and are run where there is none.
GROUPED: dict[str, Check] = {
    f"shard, {name}: changes nothing": partial(sharding_changes_nothing, name) for name in SHARDED
}
CHECKS: dict[str, Check] = ALONE | GROUPED
