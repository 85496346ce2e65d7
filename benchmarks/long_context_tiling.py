"""What tiles cost in time and what they save in memory: the rows of `benchmarks.long_context` about tiling.

Times are CPU time beside a peer in the same process. Peaks are traced: fake tensors, and every storage that is alive,
so that a block of Llama-8B at 128k tokens can be had on any machine. A unit is tokens × hidden width × 2 bytes.
"""

import statistics
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import treering as tr
from benchmarks.peers import tiling as peer
from benchmarks.rows import Row, row
from treering.anatomy import examine
from treering.technique import Site
from treering.techniques.tiling import TiledBlock, TiledMLP
from treering.techniques.tiling.tile import TiledRegion

PACKAGES = ("torch", "transformers")
TOKENS, HIDDEN, INNER = 131072, 4096, 14336


def rows(quick: bool, command: str) -> Iterator[Row]:
    yield from times(5 if quick else 25, command)
    yield from peaks(command)


def times(rounds: int, command: str) -> Iterator[Row]:
    found = peer.ask("mlp", str(rounds))
    case = f"an MLP of {peer.HIDDEN} and {peer.INNER}, {peer.TOKENS} tokens, {peer.TILES} tiles, inside a checkpoint"
    figure = "tiled MLP beside the checkpoint alone"
    yield _beside(figure, case, found["ours"], found["checkpoint"], command, at_most=1.12)
    yield _beside(figure, f"{case}: deepspeed", found[peer.PEER], found["checkpoint"], command)
    found = peer.ask("loss", str(rounds))
    case = f"{peer.TRAINED} tokens, vocabulary {peer.VOCABULARY}, 4 tiles"
    yield _beside("tiled loss beside the plain loss", case, found["ours"], found["plain"], command, at_most=1.05)


def blocks(quick: bool, command: str) -> Iterator[Row]:
    """Forward and backward of recomputed blocks, tiled and not, in one process and in turn."""
    torch.set_num_threads(1)
    for width, tokens, tile in ((512, 2048, 512), (384, 2048, 512), (256, 2048, 512), (256, 2048, 128)):
        batch = {"input_ids": torch.arange(tokens)[None] % 128, "labels": torch.arange(tokens)[None] % 128}
        sides = {
            name: _of_run(width, [tr.Full(train=("*_proj.weight", "*norm*")), *techniques], batch)
            for name, techniques in (("alone", [tr.Recompute()]), ("tiled", [tr.TiledBlock(tile=tile), tr.Recompute()]))
        }
        found = peer.seconds(sides, 3 if quick else 15)
        case = f"2 blocks of width {width}, {tokens} tokens in tiles of {tile}, float32"
        bar = 1.12 if tile >= 512 else None
        figure = "tiledblock inside recompute / recompute alone"
        yield _beside(figure, case, found["tiled"], found["alone"], command, at_most=bar)


def _of_run(width: int, techniques: Sequence[Any], batch: dict[str, Any]) -> Any:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=7 * width // 2, num_hidden_layers=2, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, vocab_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    run = tr.compose(LlamaForCausalLM(config), techniques)

    def step() -> None:
        for ready in run.ready([batch | {"count": batch["labels"].numel() - 1}]):
            run.loss(ready).backward()
        for _, parameter in run.trainable():
            parameter.grad = None

    return step


def _beside(
    figure: str, case: str, ours: Sequence[float], theirs: Sequence[float], command: str, at_most: float | None = None
) -> Row:
    """The ratio is the median of the rounds' own: what slows the machine for a while slows both sides of a round."""
    made = row(figure, case, ours, theirs, unit="s", at_most=at_most, packages=PACKAGES, command=command)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return replace(made, ratio=ratio, holds=at_most is None or ratio <= at_most)


def peaks(command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"packages": PACKAGES, "command": command}
    figure = "traced peak of one block of Llama-8B at 128k tokens, recomputed"
    for name, technique, bar in (
        ("no tiles", None, None),
        ("tiledmlp", TiledMLP(), None),
        ("tiledblock", TiledBlock(), 10.0),
    ):
        yield row(figure, name, [block_peak(technique)], unit="units", at_most=bar, **common)
    for tiles in (4, 8, 32):
        found, formula = mlp_peak(tiles)
        case = f"{tiles} tiles; peer: 6 A / n + 2 X + two buffers of a weight gradient"
        yield row("traced peak of a tiled MLP", case, [found], [formula], unit="MiB", at_most=1.05, **common)


class Peak(TorchDispatchMode):
    """Bytes alive at once, of storages that are made inside."""

    def __init__(self, known: Sequence[torch.Tensor]):
        super().__init__()
        self.live = {id(t.untyped_storage()): 0 for t in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def block_peak(technique: Any) -> float:
    """In units, above weights and input; the gradient that comes in and the block's output count."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    anatomy = examine(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        if technique is not None:
            technique.apply(model, Site(anatomy=anatomy, mesh=None))
        x = torch.empty(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        rotary = tuple(torch.empty(1, TOKENS, 128, dtype=torch.bfloat16) for _ in range(2))
        known = [x, *rotary, *model.parameters()]
        with Peak(known) as peak:
            run = lambda x: model.model.layers[0](x, position_embeddings=rotary)  # noqa: E731
            torch.autograd.backward(checkpoint(run, x, use_reentrant=False), torch.empty_like(x))
    return peak.most / (TOKENS * HIDDEN * 2)


def mlp_peak(tiles: int) -> tuple[float, float]:
    """(traced, by formula) MiB of a forward and a backward in float32, above weights, input and incoming gradient."""
    tokens, hidden, inner = 8192, 512, 1792
    with FakeTensorMode():
        mlp: Any = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner))
        region, plain = TiledRegion("mlp", [mlp], "tiledmlp"), mlp.forward
        x, given = torch.empty(1, tokens, hidden, requires_grad=True), torch.empty(1, tokens, hidden)
        with Peak([x, given, *mlp.parameters()]) as peak:
            torch.autograd.backward(region(plain, x, size=tokens // tiles, dims=2), given)
    A, X, weights = 4 * tokens * inner, 4 * tokens * hidden, 4 * 3 * hidden * inner
    return peak.most / 2**20, (6 * A / tiles + 2 * X + 2 * weights) / 2**20
