"""What the trainer costs beside a bare torch loop: per step, and before the first one.

    python -m benchmarks.loop [--quick] [--machine cpu2]

Per step: the same model, batches, loss and optimizer; ours through `train()` with every step logged, the bare one in
fifteen lines. The two alternate in one process, block by block, and single steps are compared by their medians.

First step: whole processes, from their start to the end of the first step: `treering train` on a prepared folder
beside a script that imports the same model class, loads the same folder and takes the same step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.rows import Row, row, write
from treering.data.config import Data
from treering.techniques.full import Full
from treering.train import Job
from treering.train.callbacks import Callback
from treering.train.config import Checkpoint, Model, Optimizer, Train
from treering.train.run import train

LENGTH = 512
PACKAGES = ("treering", "torch", "transformers")
BARE = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = json.loads(open(sys.argv[2]).readline())["text"]
ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
model(ids, labels=ids).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("done", flush=True)
"""


def prepare(root: Path) -> tuple[Path, Path]:
    """A folder with a model whose step takes about 200 ms on one core, and text for it."""
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0]).save_pretrained(root / "model")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    pieces = [text[i : i + LENGTH] for i in range(0, 200 * LENGTH, LENGTH)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return root / "model", root / "text.jsonl"


class Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def stepped(self, metrics) -> None:
        self.times.append(time.perf_counter())


def ours(root: Path, number: int, steps: int) -> list[float]:
    clock = Clock()
    job = Job(
        model=Model(path=str(root / "model"), dtype="float32"),
        data=Data(train=str(root / "text.jsonl"), max_length=LENGTH, packing="off", cache=str(root / "tokens")),
        techniques=(Full(),),
        train=Train(
            steps=steps, tokens_per_step=LENGTH, optimizer=Optimizer(lr=1e-4), checkpoint=Checkpoint(every=10**9)
        ),
        output=str(root / f"run{number}"),
    )
    train(job, [clock])
    return [b - a for a, b in pairwise(clock.times)]


def bare(root: Path, batches: list[torch.Tensor], steps: int) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    times = []
    for ids in batches[:steps]:
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def overhead(root: Path, rounds: int, steps: int, command: str) -> Row:
    torch.set_num_threads(1)
    model, text = prepare(root)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = [tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"] for line in text.open()]
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(rounds):
        mine.append(1000 * statistics.median(ours(root, number, steps)))
        theirs.append(1000 * statistics.median(bare(root, batches, steps)))
    return row(
        "loop overhead", "step of a 2.3 M llama, 512 tokens, 1 thread", mine, theirs,
        unit="ms", at_most=1.03, packages=PACKAGES, command=command,
    )  # fmt: skip


def first_step(root: Path, runs: int, command: str) -> Row:
    """The difference of the two medians is what the bar is about: at most one second."""
    model, text = root / "model", root / "text.jsonl"
    config = root / "first.yaml"
    config.write_text(
        f"model: {{path: {model}, dtype: float32}}\n"
        f"data: {{train: {text}, max_length: {LENGTH}, cache: {root / 'tokens'}}}\n"
        "techniques: {full: }\n"
        f"train: {{steps: 1, tokens_per_step: {LENGTH}}}\n"
        f"output: {root / 'first'}\n"
    )
    (root / "bare.py").write_text(BARE)
    waits = []
    for number in range(runs):
        output = f"output={root / f'first{number}'}"
        a = _until([sys.executable, "-u", "-m", "treering", "train", str(config), "--set", output], "step 1/1")
        b = _until([sys.executable, str(root / "bare.py"), str(model), str(text)], "done")
        waits.append(a - b)
    return row(
        "first step", "treering train − bare script, whole processes", waits,
        unit="s", at_most=1.0, packages=PACKAGES, command=command,
    )  # fmt: skip


def _until(command: list[str], line: str) -> float:
    """Seconds from the start of the process until it prints `line`."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    seen = None
    for text in process.stdout:
        if line in text and seen is None:
            seen = time.perf_counter() - began
    if process.wait() or seen is None:
        raise RuntimeError(f"{' '.join(command)} failed")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    options = parser.parse_args()
    command = "python -m benchmarks.loop" + (" --quick" if options.quick else "")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            overhead(Path(folder), 5 if options.quick else 11, 12 if options.quick else 20, command),
            first_step(Path(folder), 3 if options.quick else 7, command),
        ]
    write("loop", options.machine, rows)


if __name__ == "__main__":
    main()
