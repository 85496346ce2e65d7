"""What 8-bit codecs of an exchange do to attention: int8 next to e4m3, on outliers and on a real model's heads.

    python -m benchmarks.codecs [--quick]

Causal attention on queries, keys and values that were coded, each of 4 ranks' tokens by themselves, against the same
without a codec. Figures are relative errors of the output and of the gradients; `both ways` also codes the output and
every gradient. The real model is SmolLM2-135M-Instruct, after its rotary embedding, on the project's own pages.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import realmodel
from benchmarks.rows import Row, row, write
from tests.techniques.ulysses.codec_sets import Code, errors, outliers
from treering.techniques.ulysses.codec import RowCodec, codec

PACKAGES = ("torch", "transformers")
SHARDS, AT_MOST = 4, 0.333
PAGES = Path(__file__).parents[1] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 tokens: does it run?")
    options = parser.parse_args()
    tokens = 256 if options.quick else 1024
    command = "python -m benchmarks.codecs" + " --quick" * options.quick
    sets = {
        f"{kind}, 4 heads of {width}, {tokens} tokens": [outliers(kind, tokens=tokens, width=width)]
        for kind in ("gauss", "channels", "tokens")
        for width in (64, 128)
    }
    sets[f"SmolLM2-135M-Instruct, 30 layers, {tokens} tokens"] = real(tokens)
    rows: list[Row] = []
    for case, given in sets.items():
        rows += compared(case, given, command)
    rows += [sizes(name, width, command) for name in ("e4m3", "int8") for width in (64, 128)]
    write("codecs", "cpu2", rows)
    return 0


def compared(case: str, given: list[list[Tensor]], command: str) -> list[Row]:
    bar = None if case.startswith("gauss") else AT_MOST
    found = {name: measured(name, given) for name in ("e4m3", "int8", "e4m3, K apart", "int8, K apart")}
    rows = []
    for way in ("forward", "both ways"):
        for key in ("output", "dq", "dk", "dv"):
            for pick, of in (("median", statistics.median), ("worst", max))[: 2 if len(given) > 1 else 1]:
                each = {name: [of([layer[key] for layer in layers[way]])] for name, layers in found.items()}
                name = f"error of {key}, {way}"
                text = f"{case}, {pick}" if len(given) > 1 else case
                rows.append(
                    row(f"{name}, int8 / e4m3", text, each["int8"], each["e4m3"], unit="", at_most=bar,
                        packages=PACKAGES, command=command)
                )  # fmt: skip
                rows += [
                    row(f"{name}, {which} with K apart / without", text, each[f"{which}, K apart"], each[which],
                        unit="", packages=PACKAGES, command=command)
                    for which in ("e4m3", "int8")
                ]  # fmt: skip
    return rows


def measured(name: str, given: list[list[Tensor]]) -> dict[str, list[dict[str, float]]]:
    name, apart = name.removesuffix(", K apart"), name.endswith("K apart")
    code = through(codec(name))
    key = None if apart else code
    return {
        "forward": [errors(one, [code, key, code], shards=SHARDS) for one in given],
        "both ways": [errors(one, [code, key, code, code], code, shards=SHARDS) for one in given],
    }


def through(rows: RowCodec | None) -> Code:
    assert rows is not None
    return lambda x: rows.decode(rows.encode(x), *x.shape, torch.float32)


def sizes(name: str, width: int, command: str) -> Row:
    rows, tokens, heads = codec(name), 4096, 8
    assert rows is not None
    each = rows.size(tokens, heads, width) / (tokens * heads * width)
    case = f"{name}, {tokens} tokens, {heads} heads of {width}"
    return row("bytes of an element", case, [each], unit="bytes", packages=PACKAGES, command=command)


def real(tokens: int) -> list[list[Tensor]]:
    """Return query, key, value of every layer, after the rotary embedding, and a gradient of the output."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers: list[list[Tensor]] = []

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Any:
        out, weights = sdpa_attention_forward(module, query, key, value, *rest, **kwargs)
        here = [x[0].detach().double() for x in (query, key, value)]
        layers.append(here)
        if out.requires_grad:
            out.register_hook(lambda gradient: here.append(gradient[0].transpose(0, 1).double()))
        return out, weights

    AttentionInterface.register("codecs_keep", keep)
    folder = realmodel.folder()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="codecs_keep")
    text = "\n".join(path.read_text("utf-8") for path in sorted(PAGES.glob("*.md")))
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(len(layer) == 4 for layer in layers), "the gradient of an output is missing"
    return layers


if __name__ == "__main__":
    sys.exit(main())
