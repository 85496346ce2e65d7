"""Template + tokenise + mask + pack, beside `datasets.map` doing template + mask; and how full the bins are.

    python -m benchmarks.data [--quick] [--machine cpu2]

The peer gets the samples already in memory, in batches (its faster way), with a template that has generation tags (the
only kind it can mask) and one process. Ours reads the jsonl file, writes its cache, verifies it and plans an epoch.
"""

import argparse
import json
import pydoc_data.topics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.rows import Row, row, write
from treering.data.config import Data
from treering.data.examples import build
from treering.data.order import Order

TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNTAGGED = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PACKAGES = ("treering", "datasets", "tokenizers", "transformers", "numpy")


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(list(pydoc_data.topics.topics.values()), trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<eos>", "<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def make_chats(count: int) -> list[dict]:
    """One to three exchanges of English words; lengths are log-normal, about 600 tokens in the mean."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    draw = np.random.default_rng(0)
    chats = []
    for _ in range(count):
        turns = 2 * int(draw.integers(1, 4))
        total = int(np.clip(draw.lognormal(np.log(190), 0.8), 4, 1600))
        messages = []
        for i in range(turns):
            length, start = max(1, total // turns), int(draw.integers(0, len(words) - 2000))
            messages.append({"role": ("user", "assistant")[i % 2], "content": " ".join(words[start : start + length])})
        chats.append({"messages": messages})
    return chats


def ours(path: Path, tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[float, float, int]:
    tokenizer.chat_template = template
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        examples = build(Data(train=str(path), cache=cache, max_length=4096), tokenizer)
        order = Order(examples.lengths, seed=0, tokens_per_step=8 * 4096, capacity=4096)
        fill = order.fill(0)
        return time.perf_counter() - began, fill, int(examples.trained.sum())


def peer(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> tuple[float, int]:
    tokenizer.chat_template = TAGGED

    def encode(batch: dict) -> dict:
        out = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": out["input_ids"], "mask": out["assistant_masks"]}

    began = time.perf_counter()
    mapped = dataset.map(encode, batched=True, remove_columns=["messages"], load_from_cache_file=False)
    seconds = time.perf_counter() - began
    return seconds, sum(sum(mask) for mask in mapped["mask"])


def measure(count: int, runs: int, command: str) -> list[Row]:
    tokenizer = make_tokenizer()
    chats = make_chats(count)
    times: dict[str, list[float]] = {"tagged": [], "untagged": [], "peer": []}
    fills = []
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
        dataset = datasets.Dataset.from_list(chats)
        for _ in range(runs):
            seconds, fill, trained = ours(path, tokenizer, TAGGED)
            times["tagged"].append(seconds)
            fills.append(fill)
            seconds, same = peer(dataset, tokenizer)
            times["peer"].append(seconds)
            if trained != same:
                raise SystemExit(f"not the same work: we train {trained} tokens, the peer {same}")
            seconds, _, trained = ours(path, tokenizer, UNTAGGED)
            times["untagged"].append(seconds)
            if trained != same:
                raise SystemExit(f"the proved mask has {trained} trained tokens, the tags say {same}")
    rates = {name: [count / t for t in taken] for name, taken in times.items()}
    shared = {"packages": PACKAGES, "command": command}
    figure = "template + tokenise + mask + pack against datasets.map"
    return [
        row(figure, f"{count} chats, tags", rates["tagged"], rates["peer"], unit="chats/s", at_least=1.0, **shared),
        row(
            figure, f"{count} chats, no tags", rates["untagged"], rates["peer"], unit="chats/s", at_least=1.0, **shared
        ),
        row("fill of bins", f"{count} chats, capacity 4096", fills, unit="share", at_least=0.98, **shared),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10^4 chats instead of 10^5")
    parser.add_argument("--machine", default="cpu2")
    chosen = parser.parse_args()
    command = "python -m benchmarks.data" + (" --quick" if chosen.quick else "")
    rows = measure(10_000 if chosen.quick else 100_000, 3, command)
    write("data", chosen.machine, rows)


if __name__ == "__main__":
    main()
