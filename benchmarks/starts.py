"""What the starts of adapters bring back of a quantized mixture, before and after distillation.

    python -m benchmarks.starts [--quick]

A mixture of 8 experts and 1.8 million weights is trained on bytes of Python's standard library, quantized, and given
adapters of rank 8 on attention and every expert. The figure is the divergence KL(original ‖ quantized) per byte of
held-out files, against that of the start `residual`.
"""

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import treering as tr
from benchmarks.rows import Row, row, write

PACKAGES = ("torch", "transformers")
FORMATS: dict[str, dict[str, Any]] = {"nvfp4": {}, "int3": {"group": 32}}
STARTS: dict[str, dict[str, Any]] = {
    "kaiming_zeros": {"init": "kaiming_zeros"},
    "residual": {"init": "residual"},
    "activation": {"init": "activation"},
    "activation, allocate greedy": {"init": "activation", "allocate": "greedy"},
}
RANK, LENGTH, ROWS = 8, 256, 16
BARS = {"activation": 0.6, "activation, allocate greedy": 0.45}  # of the divergence with `residual`, at nvfp4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, distilled = (40, 6) if options.quick else (400, 60)
    command = "python -m benchmarks.starts" + " --quick" * options.quick
    train, held_out = text()
    model = trained(train, steps)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def fresh() -> Any:
        built = mixture()
        built.load_state_dict(state)
        return built

    teacher = tr.compose(fresh(), [], frozen=True).model.eval()
    statistics = tr.measure(fresh(), [{"input_ids": one[None]} for one in windows(train, 48, seed=1)])
    rows: list[Row] = []
    for name, settings in FORMATS.items():
        peer: tuple[float, float] | None = None
        for start, adapter in STARTS.items():
            run = tr.compose(fresh(), [tr.Quantize(format=name, **settings), tr.LoRA(rank=RANK, **adapter)],
                             statistics=statistics)  # fmt: skip
            before = divergence(teacher, run.model, held_out)
            distil(teacher, run, train, distilled)
            ours = before, divergence(teacher, run.model, held_out)
            case = f"{name}, rank {RANK}, start {start}"
            rows.append(compared("at the start", case, ours[0], peer and peer[0], bar_of(name, start), command))
            case += f", {distilled} steps of {4 * LENGTH} bytes"
            better = 1.0 if "activation" in start else None
            rows.append(compared("distilled", case, ours[1], peer and peer[1], better, command))
            peer = ours if start == "residual" else peer
    write("starts", "cpu2", rows)
    return 0


def compared(kind: str, case: str, ours: float, peer: float | None, bar: float | None, command: str) -> Row:
    return row(
        f"KL to the original {kind} / with start residual",
        case,
        [ours],
        [] if peer is None else [peer],
        at_most=bar,
        unit="nats a byte",
        packages=PACKAGES,
        command=command,
    )


def bar_of(name: str, start: str) -> float | None:
    return BARS.get(start) if name == "nvfp4" else None


def text() -> tuple[Tensor, Tensor]:
    """Return the bytes of some modules of Python's standard library, to train on and held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 4000)
    join = lambda chosen: torch.tensor(list(b"".join(path.read_bytes() for path in chosen)))  # noqa: E731
    return join([path for i, path in enumerate(files) if i % 10]), join(files[::10])


def windows(data: Tensor, count: int, *, seed: int) -> Tensor:
    starts = torch.randint(len(data) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[s : s + LENGTH] for s in starts.tolist()])


def mixture() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=LENGTH,
    )
    return Qwen3MoeForCausalLM(config)


def trained(data: Tensor, steps: int) -> Any:
    run = tr.compose(mixture(), [tr.Full()])
    optimizer = run.optimizer(lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    batches = ({"input_ids": (ids := windows(data, ROWS, seed=10 + i)), "labels": ids} for i in range(steps))
    for number, micro_batches in enumerate(run.steps(batches)):
        losses = [run.loss(batch) for batch in micro_batches]
        for loss in losses:
            loss.backward()
        run.step(optimizer, clip=1.0)
        schedule.step()
        if number % 50 == 0:
            print(f"step {number}: {float(sum(losses).detach()):.3f} nats a byte", flush=True)  # type: ignore[union-attr]
    run.undo()
    return run.model


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return F.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)


def _kl(teacher: Any, model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = _log_probabilities(teacher, ids)
    return F.kl_div(_log_probabilities(model, ids), wanted, reduction="sum", log_target=True) / ids.numel()


@torch.no_grad()
def divergence(teacher: Any, model: Any, held_out: Tensor) -> float:
    model.eval()
    each = [float(_kl(teacher, model, ids)) for ids in windows(held_out, 64, seed=2).split(8)]
    model.train()
    return sum(each) / len(each)


def distil(teacher: Any, run: Any, data: Tensor, steps: int) -> None:
    """Train the adapters to give the original's probabilities, with a rate that falls to 0."""
    optimizer = run.optimizer(lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 5) * (1 - i / steps))
    for ids in batches(data, steps):
        _kl(teacher, run.model, ids).backward()
        run.step(optimizer)
        schedule.step()


def batches(data: Tensor, steps: int) -> Iterator[Tensor]:
    for i in range(steps):
        yield windows(data, 4, seed=1000 + i)


if __name__ == "__main__":
    sys.exit(main())
