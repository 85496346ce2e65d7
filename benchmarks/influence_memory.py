"""Memory and wall time of a build: each in a process of its own, as memory that was used once stays with a process."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import ROOT
from benchmarks.rows import Row, row

PACKAGES = ("treering", "torch", "transformers")
# A model of which activations and logits are large next to what a process needs anyway.
SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LENGTH = 4096
SIDES = ("forward and backward", "treering, psift, p = 16", "treering, eigen-topk, block 64")


def memory(quick: bool, command: str) -> Iterator[Row]:
    """Resident memory above that of the loaded model, with recompute and tiles on both sides."""
    found = {side: [_asked(side) for _ in range(1 if quick else 3)] for side in SIDES}
    base = [one["bytes"] / 2**20 for one in found[SIDES[0]]]
    for side in SIDES[1:]:
        yield row(
            "peak memory above the model", f"{side}, a document of {LENGTH:,} tokens; peer: {SIDES[0]}",
            [one["bytes"] / 2**20 for one in found[side]], base, unit="MiB", at_most=1.3, packages=PACKAGES,
            command=command,
        )  # fmt: skip


def _asked(side: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.influence_memory", side]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(found.strip().splitlines()[-1])


def resident() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def inside(side: str) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import treering as tr
    from benchmarks.influence_ours import documents
    from treering.curvature import GradientSettings, measure
    from treering.data.loader import collate_measured
    from treering.influence import build
    from treering.sketches import SketchSettings

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    tiles = [tr.Recompute(), tr.TiledMLP(), tr.TiledLoss()]
    run = tr.compose(model, tiles, frozen=True, dtype="float32")
    rows = torch.randint(SHAPE["vocab_size"], (2, LENGTH)).tolist()
    texts = documents(rows, "train")
    settings, known = SketchSettings(kind="psift", curvature="identity", size=16), None
    if "eigen" in side:
        settings = SketchSettings(entries=42, block=64, curvature="kfac")
        short = collate_measured(documents([rows[0][:128]], "short"), "on")
        known = measure(run, [short], gradients=GradientSettings(kind="kfac", labels="data"))
    before, began = resident(), time.perf_counter()
    if side == SIDES[0]:
        run.model.get_input_embeddings().weight.requires_grad_(True)
        for text in texts:
            [batch] = run.ready([collate_measured([text], "on")])
            run.objective_sum(batch, run.plan.objective).backward()
            run.model.zero_grad()
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(run, texts, Path(folder) / "index", settings=settings, statistics=known, capacity=LENGTH)
    return {"bytes": resident() - before, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    print(json.dumps(inside(sys.argv[1])))
