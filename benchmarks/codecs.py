"""What 8-bit messages of Ulysses cost in accuracy: rotated integers with the mean apart, against e4m3 rows.

python -m benchmarks.codecs [--quick]

Relative error of one attention's output, and of the gradients of q, k and v, where what 4 ranks send is coded: each
rank's tokens are a block of their own. `forward coded`: q, k and v, with exact gradients. `all coded`: also the output,
its gradient, and the gradients of q, k and v. Real ones are of SmolLM2-135M-Instruct on a page of this repository, all
layers, after the rotary embedding, with the gradient of the loss at each attention.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import realmodel
from benchmarks.rows import Row, row, write
from treering.attention import Documents
from treering.attention.install import install
from treering.attention.reference import reference
from treering.core.seeds import generator
from treering.techniques.ulysses.codec import codec

COMMAND = "python -m benchmarks.codecs"
PACKAGES = ("torch", "transformers")
RANKS = 4
Layer = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value and the gradient of the output, [1, H, T, D]


def drawn(kind: str, tokens: int) -> Layer:
    """Normally distributed rows; `channels`: offsets of some channels of q and k, a large one of v; `tokens`: also rows
    that are large as a whole, as a first token's."""
    heads, width = 4, 64

    def normal(name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator(0, "codecs", kind, name))

    query, key, value, gradient = (normal(name, 1, heads, tokens, width) for name in "qkvg")
    if kind != "normal":
        for x, size, channels in ((key, 10.0, [3, 17, 40]), (query, 4.0, [3, 20])):
            x[..., channels] += size * normal(f"sign {size}", heads, 1, len(channels)).sign()
        value[..., 7] *= 6
    if kind == "tokens":
        value[:, :, ::97] *= 20
        query[:, :, ::131] *= 8
    return query, key, value, gradient


class Taken:
    """An exchange that exchanges nothing: it takes what each attention is given, and its gradient."""

    def __init__(self) -> None:
        self.layers: list[list[Tensor]] = []

    def around(self, attend: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        layer = [x.detach().clone() for x in (query, key, value)]
        self.layers.append(layer)
        out: Tensor = attend(query, key, value, sinks)
        out.register_hook(lambda gradient: layer.append(gradient.clone()))
        return out


def real(tokens: int) -> list[Layer]:
    """Every attention of the real model on the first tokens of a page."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = realmodel.folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    install(model)
    text = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text("utf-8")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:tokens]])
    taken = Taken()
    documents = Documents.of([ids.shape[1]]).exchanged(taken)
    logits = model(ids, position_ids=torch.arange(ids.shape[1])[None], documents=documents, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    return [tuple(layer) for layer in taken.layers]  # type: ignore[misc]


def through(name: str, x: Tensor) -> Tensor:
    """What ranks get of `x`, [1, H, T, D], if each sends its tokens as one block."""
    rows = codec(name)
    if rows is None:
        return x
    shards = [part[0].transpose(0, 1) for part in x.tensor_split(RANKS, dim=2)]
    coded = [rows.decode(rows.encode(shard), *shard.shape, torch.float32) for shard in shards]
    return torch.cat(coded).transpose(0, 1)[None]


def errors(layer: Layer, name: str, *, key: str | None = None, gradients: bool) -> list[float]:
    """Relative errors of output and of the gradients of q, k and v; `key`: another codec for keys."""
    query, keys, value, gradient = layer
    back = name if gradients else "none"
    results = []
    for coded in (False, True):
        names = (name, key or name, name) if coded else ("none",) * 3
        tensors = [through(of, x).requires_grad_() for of, x in zip(names, (query, keys, value))]
        out = reference(*tensors, Documents.of([query.shape[2]]))
        found = torch.autograd.grad(out, tensors, through(back, gradient) if coded else gradient)
        sent = [out.detach(), *found]
        results.append([through(back, x) for x in sent] if coded else sent)
    return [float((found - wanted).norm() / wanted.norm()) for wanted, found in zip(*results)]


def compared(kind: str, layers: Sequence[Layer]) -> Iterator[Row]:
    """int8 against e4m3, the median and the worst over layers."""
    for gradients in (False, True):
        what = "all coded" if gradients else "forward coded"
        sides = {name: [errors(layer, name, gradients=gradients) for layer in layers] for name in ("int8", "e4m3")}
        for i, tensor in enumerate(("output", "gradient of q", "gradient of k", "gradient of v")):
            mine, theirs = ([one[i] for one in sides[name]] for name in ("int8", "e4m3"))
            for how, of in (("median", statistics.median), ("worst", max)):
                if how == "worst" and len(layers) == 1:
                    continue
                case = f"{kind}, {what}" + f", {how} layer" * (len(layers) > 1)
                yield row(
                    f"relative error of the {tensor}, int8 / e4m3", case, [of(mine)], [of(theirs)], unit="relative",
                    at_most=None if kind == "normal" else 1 / 3,
                    packages=PACKAGES, command=COMMAND,
                )  # fmt: skip
    apart = statistics.median(sum(errors(layer, "int8", key="none", gradients=True)) for layer in layers)
    together = statistics.median(sum(errors(layer, "int8", gradients=True)) for layer in layers)
    yield row(
        "sum of the four errors, keys uncoded / all in int8", f"{kind}, all coded", [apart], [together],
        unit="relative", packages=PACKAGES, command=COMMAND,
    )  # fmt: skip


def sizes() -> Iterator[Row]:
    for name in ("int8", "e4m3"):
        for width in (64, 128):
            rows = codec(name)
            assert rows is not None
            yield row(
                f"bytes of an element, {name} / bfloat16", f"4,096 tokens, 8 heads of {width}",
                [rows.size(4096, 8, width) / (4096 * 8 * width)], [2.0], unit="B", at_most=0.54,
                packages=PACKAGES, command=COMMAND,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="every sixth layer of the real model")
    quick = parser.parse_args().quick
    rows = list(sizes())
    for kind in ("normal", "channels", "tokens"):
        rows += compared(kind, [drawn(kind, 1024)])
    rows += compared("SmolLM2-135M-Instruct", real(1024)[:: 6 if quick else 1])
    write("codecs", "cpu2", rows)


if __name__ == "__main__":
    main()
