"""Adapters on stacked experts: what they add to a layer's time next to peft's, and what is kept for the backward.

    python -m benchmarks.experts [--rounds N] [--quick]

One mixture layer in float32, forward and backward, by the CPU time of this process; all sides alternate in one run. The
base is transformers' layer, frozen, on its `grouped_mm`. Peer: peft's `target_parameters`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, row, write
from treering.anatomy.matrices import Matrix
from treering.experts.grouped_forward import Addition, grouped
from treering.formats import named
from treering.techniques.lora.addend import ExpertAddend
from treering.techniques.quantize.packed import PackedExperts, PackedWeight

COMMAND = "python -m benchmarks.experts"
PACKAGES = ("torch", "transformers", "peft")
HIDDEN, INNER, RANK, CHOSEN = 512, 256, 16, 4


class Layer(nn.Module):
    """One module of stacked experts, with the routing of some tokens."""

    def __init__(self, experts: int, tokens: int, hidden: int = HIDDEN, inner: int = INNER):
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=CHOSEN
        )
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.data.normal_(0, 0.02, generator=draw).requires_grad_(False)
            parameter.requires_grad_(False)
        choice = torch.rand(tokens, experts, generator=draw).topk(CHOSEN)
        self.index, self.weights = choice.indices, choice.values
        self.hidden = torch.randn(tokens, hidden, generator=draw)

    def forward(self) -> Tensor:
        return self.experts(self.hidden.clone().requires_grad_(), self.index, self.weights)


def adapted(layer: Layer) -> Layer:
    """Our adapters on both stacks."""
    forward = grouped(layer.experts, "experts")
    for leaf in forward.stacks:
        experts, outputs, inputs = getattr(layer.experts, leaf).shape
        matrix = Matrix(
            weight=f"experts.{leaf}", module="experts", outputs=outputs, inputs=inputs, experts=experts,
            transposed=False, block=0, role="experts",
        )  # fmt: skip
        addend = ExpertAddend(matrix, RANK, 1.0, torch.float32).to_empty(device="cpu")
        for parameter in addend.parameters():
            parameter.data.normal_(0, 0.02)
        layer.experts.add_module(f"lora_{leaf}", addend)
        forward.addends[leaf].append(Addition(addend))
    return layer


def adapted_by_peft(layer: Layer) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=targets)
    return get_peft_model(layer, config)  # type: ignore[arg-type]


def packed(layer: Layer, *, naive: bool) -> Layer:
    """The same layer with nvfp4 codes; `naive`: decoded where they multiply, as anybody would write it first."""
    form = named("nvfp4")
    forward = grouped(layer.experts, "experts")
    for leaf in forward.stacks:
        weight = getattr(layer.experts, leaf)
        store = PackedWeight(form, tuple(weight.shape), torch.device("cpu"), weight.dtype)
        for key, value in form.encode(weight).items():
            getattr(store, key).data = value
        delattr(layer.experts, leaf)
        layer.experts.add_module(f"packed_{leaf}", store)
        forward.sources[leaf] = _Naive(store) if naive else PackedExperts(store)
    return layer


class _Naive:
    def __init__(self, store: PackedWeight):
        self.store = store

    def product(self, x: Tensor, routing: Any) -> Tensor:
        from torch.nn import functional as F

        tensors = {key: getattr(self.store, key) for key in self.store.keys}
        W = self.store.form.decode(tensors, self.store.shape[-1], x.dtype)
        return F.grouped_mm(x, W.mT, offs=routing.offsets)


def seconds(sides: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a forward and a backward of each side, in turn; the first round is not counted."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began = time.process_time()
            side().square().sum().backward()
            if number:
                measured[name].append(time.process_time() - began)
    return measured


def saved_bytes(side: Callable[[], Tensor]) -> int:
    """Return the bytes of the tensors that a forward keeps for its backward, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in getattr(side, "parameters", list)()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = side()  # alive while its storages are counted
    total = sum(kept.values())
    del out
    return total


def times(rounds: int, quick: bool) -> list[Row]:
    rows = []
    for experts in (64,) if quick else (64, 128):
        for tokens in (128, 512) if quick else (128, 512, 2048):
            sides = {
                "base": Layer(experts, tokens),
                "ours": adapted(Layer(experts, tokens)),
                "peft": adapted_by_peft(Layer(experts, tokens)),
            }
            found = seconds(sides, rounds)  # type: ignore[arg-type]
            case = f"{experts} experts of {HIDDEN} × {INNER}, {CHOSEN} chosen, {tokens} tokens, rank {RANK}, float32"
            pairs = list(zip(found["base"], found["ours"], found["peft"], strict=True))
            ours, peers = [o / b - 1 for b, o, _ in pairs], [p / b - 1 for b, _, p in pairs]
            rows.append(
                row("added time of adapters / the layer without", case, ours, unit="", at_most=0.28,
                    packages=PACKAGES, command=COMMAND)
            )  # fmt: skip
            bar = 3.0 if tokens <= 512 else 2.5
            rows.append(
                row("added time of peft's adapters / of ours", case, [statistics.median(peers)],
                    [statistics.median(ours)], unit="", at_least=bar, packages=PACKAGES, command=COMMAND)
            )  # fmt: skip
    return rows


def memory() -> list[Row]:
    few, many = (saved_bytes(adapted(Layer(experts, 512))) for experts in (16, 128))
    rows = [
        row("bytes kept for the backward, 128 experts / 16", f"512 tokens, rank {RANK}, float32", [many], [few],
            unit="B", at_most=1.05, packages=PACKAGES, command=COMMAND)
    ]  # fmt: skip
    ours, naive = (saved_bytes(packed(Layer(64, 512), naive=n)) for n in (False, True))
    rows.append(
        row("bytes kept for the backward on packed experts / when decoded where they multiply",
            "64 experts, nvfp4, 512 tokens", [ours], [naive], unit="B", at_most=0.3, packages=PACKAGES,
            command=COMMAND)
    )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = memory() + times(3 if options.quick else options.rounds, options.quick)
    if options.quick:
        for entry in rows:
            print(f"{entry.figure} | {entry.case} | {entry.ours:.4g} | {entry.peer} | {entry.ratio} | {entry.holds}")
        return 0
    write("experts", "cpu2", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
