"""What recompute and offloaded parameters cost beside transformers' and torch's own.

    python -m benchmarks.recompute_rows [--quick] [--machine cpu2]

Both sides alternate step by step in one process, on models with the same weights, and are compared by medians: of CPU
process time, or of the time on the clock where there is a GPU. On a CPU there is no copy to hide, so what is measured
is the bookkeeping; transformers' offload needs a GPU, and its row is there only with one. `rows(quick)` is what other
benchmarks import; this file by itself writes results/recompute.MACHINE.json.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

import treering as tr
from benchmarks.rows import Row, row, write
from treering.techniques.recompute import Recompute

COMMAND = "python -m benchmarks.recompute_rows"
PACKAGES = ("treering", "torch", "transformers")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def model(length: int) -> nn.Module:
    """A Llama whose step takes about half a second on one core."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(DEVICE).train()


def ours(length: int, *techniques: Recompute) -> nn.Module:
    return tr.compose(model(length), [tr.Full(), *techniques]).model


def theirs(length: int, offload: bool) -> nn.Module:
    made = model(length)
    made.activation_checkpointing_enable(offload=offload)
    return made


def stepper(made: nn.Module, length: int) -> Callable[[], None]:
    ids = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step() -> None:
        made(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        made.zero_grad()
        if GPU:
            torch.cuda.synchronize()

    return step


def alternate(sides: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Seconds of each, in turn; the first round warms up."""
    clock = time.perf_counter if GPU else time.process_time
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(runs + 1):
        for name, side in sides.items():
            began = clock()
            side()
            if i:
                found[name].append(clock() - began)
    return found


def step_time(quick: bool) -> list[Row]:
    """A step of ours beside transformers' checkpoint (torch's, non-reentrant), with and without offload."""
    length, runs = (512, 5) if quick else (1024, 25)
    made = {
        "plain": ours(length),
        "ours": ours(length, Recompute()),
        "ours, offload": ours(length, Recompute(offload="cpu")),
        "ours, keep": ours(length, Recompute(keep=("attention",))),
        "theirs": theirs(length, False),
    }
    if GPU:
        made["theirs, offload"] = theirs(length, True)
    seconds = alternate({name: stepper(one, length) for name, one in made.items()}, runs)
    case = f"6 blocks, width 256, {length} tokens"

    def compare(what: str, mine: str, peer: str, bar: float | None) -> Row:
        return row(what, case, seconds[mine], seconds[peer], unit="s", at_most=bar, packages=PACKAGES, command=COMMAND)

    beside = []
    if GPU:
        beside = [compare("step with offload: cpu / transformers' offload", "ours, offload", "theirs, offload", 1.03)]
    return [
        *beside,
        compare("step with recompute / with transformers' checkpoint", "ours", "theirs", 1.03),
        compare("step with offload: cpu / without offload", "ours, offload", "ours", 1.05),
        compare("step with keep: [attention] / without keep", "ours, keep", "ours", None),
        compare("step with recompute / without", "ours", "plain", None),
    ]


def optimizer_time(quick: bool) -> list[Row]:
    """AdamW where parameters rest on the CPU: the fused kernel beside torch's default there."""
    shapes = [(1024, 1024)] * (4 if quick else 16) + [(1024,)] * 32
    sides = {}
    for name, fused in (("fused", True), ("default", None)):
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        sides[name] = torch.optim.AdamW(parameters, lr=1e-4, fused=fused).step
    seconds = alternate(sides, 5 if quick else 25)
    case = f"{sum(torch.Size(s).numel() for s in shapes) / 1e6:.1f} million parameters, float32"
    return [
        row(
            "AdamW on the CPU, fused / default",
            case,
            seconds["fused"],
            seconds["default"],
            unit="s",
            at_most=1.0,
            packages=PACKAGES,
            command=COMMAND,
        )
    ]


def rows(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    return [*step_time(quick), *optimizer_time(quick)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    arguments = parser.parse_args()
    write("recompute_quick" if arguments.quick else "recompute", arguments.machine, rows(arguments.quick))
