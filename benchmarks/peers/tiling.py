"""DeepSpeed's tiled MLP, ours, and a checkpoint alone, in one process and in turn.

python -m benchmarks.peers.tiling        makes the environment; `benchmarks.long_context_tiling` asks it for figures

Liger's and axolotl's tiled MLPs have the structure of DeepSpeed's; Liger's needs Triton, which a CPU does not have.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.peers import environment
from treering.techniques.tiling.losses import OutputHead, TiledHead
from treering.techniques.tiling.tile import TiledRegion

PACKAGES = (
    "deepspeed==0.18.2",
    "hjson==3.1.0",
    "ninja==1.13.2",
    "py-cpuinfo==9.0.0",
    "psutil==7.2.2",
    "msgpack==1.2.4",
    "einops==0.8.2",
)
PEER = "deepspeed"
HIDDEN, INNER, TOKENS, TILES = 512, 1792, 4096, 8
VOCABULARY, TRAINED = 8192, 2048


def ask(*arguments: str) -> Any:
    """A figure from inside the environment, which is made if it is not there."""
    python = environment.python("tiling", PACKAGES, proof="deepspeed.runtime.sequence_parallel.ulysses_sp")
    return environment.ask(python, "benchmarks.peers.tiling", *arguments)


def mlps() -> dict[str, Callable[[], None]]:
    """A forward and a backward of one recomputed MLP."""
    mlp: Any = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER))
    x, given = torch.randn(1, TOKENS, HIDDEN, requires_grad=True), torch.randn(1, TOKENS, HIDDEN)
    region, plain = TiledRegion("mlp", [mlp], "tiledmlp"), mlp.forward

    def step(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(checkpoint(forward, x, use_reentrant=False), given)

    sides = {
        "checkpoint": step(mlp),
        "ours": step(lambda x: region(plain, x, size=TOKENS // TILES, dims=2)),
    }
    if theirs := _deepspeed(mlp):
        sides[PEER] = step(theirs)
    return sides


def _deepspeed(mlp: Any) -> Callable[[Tensor], Tensor] | None:
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    except ImportError:
        return None
    body = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731
    return lambda x: TiledMLP.apply(body, mlp, x, TILES, list(mlp.parameters()))


def losses() -> dict[str, Callable[[], None]]:
    """Head and cross-entropy of so many trained tokens, as the plain loss of a run has them, and in tiles."""
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden, targets = torch.randn(TRAINED, HIDDEN, requires_grad=True), torch.randint(VOCABULARY, (TRAINED,))
    tiled = TiledHead(OutputHead(module=head))
    plain = lambda: F.cross_entropy(head(hidden).float(), targets, reduction="sum")  # noqa: E731
    return {
        "plain": lambda: (plain() / TRAINED).backward(),
        "ours": lambda: (tiled.cross_entropy(hidden, targets, size=TRAINED // 4) / TRAINED).backward(),
    }


def seconds(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Of CPU time, every side in turn, after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, step in sides.items():
            start = time.process_time()
            step()
            if number:
                found[name].append(time.process_time() - start)
    return found


def main() -> None:
    torch.set_num_threads(1)
    if not sys.argv[1:]:
        environment.python("tiling", PACKAGES, proof="deepspeed.runtime.sequence_parallel.ulysses_sp")
        return
    made = {"mlp": mlps, "loss": losses}[sys.argv[1]]()
    print(json.dumps(seconds(made, int(sys.argv[2]))), flush=True)


if __name__ == "__main__":
    main()
