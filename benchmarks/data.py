"""Template + tokenise + mask + pack, beside `datasets.map` doing template + mask; and how full the bins are.

    python -m benchmarks.data [--quick] [--runs 5] [--machine cpu2]

Both sides make ids and assistant mask of every sample, write them to their caches, and are compared value by value.
Both may use all threads of the tokenizer. The peer gets the samples already in memory, in batches (its faster way),
with a template that has generation tags (the only kind it can mask) and one process. Ours reads the jsonl file, checks
it, reads its cache back and plans an epoch. The sides alternate and change places from run to run. The goal is one of
wall time; the ratios of CPU time stand beside it, because a shared machine disturbs those less.
"""

import argparse
import json
import pydoc_data.topics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import xxhash
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.rows import Row, row, write
from treering.data.config import Data
from treering.data.examples import build
from treering.data.order import Order

# The newline behind a tag is written as an expression: Jinja would trim it, and the two templates would differ.
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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


@dataclass(frozen=True, kw_only=True)
class Run:
    wall: float
    cpu: float  # of all threads of this process
    made: str  # digest of all lengths, ids and masks
    fill: float = 0.0


def digest(lengths: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> str:
    state = xxhash.xxh3_128()
    for values, dtype in ((lengths, "<i8"), (ids, "<u4"), (mask, "|b1")):
        state.update(np.ascontiguousarray(values, dtype=dtype).tobytes())
    return state.hexdigest()


def ours(path: Path, tokenizer: PreTrainedTokenizerFast, template: str) -> Run:
    tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as cache:
        wall, cpu = time.perf_counter(), time.process_time()
        examples = build(Data(train=str(path), cache=cache, max_length=4096), tokenizer)
        fill = Order(examples.lengths, seed=0, tokens_per_step=8 * 4096, capacity=4096).fill(0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        documents = [examples.document(i) for i in range(len(examples))]
        ids, mask = (np.concatenate([getattr(d, name) for d in documents]) for name in ("ids", "mask"))
        return Run(wall=wall, cpu=cpu, made=digest(examples.lengths, ids, mask), fill=fill)


def peer(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> Run:
    tokenizer.chat_template = TAGGED

    def encode(batch: dict) -> dict:
        out = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": out["input_ids"], "mask": out["assistant_masks"]}

    with tempfile.TemporaryDirectory() as cache:
        wall, cpu = time.perf_counter(), time.process_time()
        mapped = dataset.map(
            encode, batched=True, remove_columns=["messages"], cache_file_name=str(Path(cache) / "mapped.arrow")
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        ids, mask = (mapped.data.column(name).combine_chunks() for name in ("input_ids", "mask"))
        made = digest(ids.value_lengths().to_numpy(), ids.flatten().to_numpy(), mask.flatten().to_numpy())
        return Run(wall=wall, cpu=cpu, made=made)


def measure(count: int, runs: int, command: str) -> list[Row]:
    tokenizer = make_tokenizer()
    chats = make_chats(count)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
        dataset = datasets.Dataset.from_list(chats)
        sides: dict[str, Callable[[], Run]] = {
            "tags": lambda: ours(path, tokenizer, TAGGED),
            "peer": lambda: peer(dataset, tokenizer),
            "no tags": lambda: ours(path, tokenizer, UNTAGGED),
        }
        few = Path(folder) / "few.jsonl"
        few.write_text("".join(json.dumps(chat) + "\n" for chat in chats[:100]), "utf-8")
        ours(few, tokenizer, TAGGED)  # imports, before any clock runs
        peer(dataset.select(range(100)), tokenizer)
        done: dict[str, list[Run]] = {name: [] for name in sides}
        names = list(sides)
        for i in range(runs):
            for name in names[i % 3 :] + names[: i % 3]:
                done[name].append(sides[name]())
    made = {run.made for taken in done.values() for run in taken}
    if len(made) != 1:
        raise SystemExit("not the same work: ids or masks of the two sides differ")
    return _rows(count, done, command)


def _rows(count: int, done: dict[str, list[Run]], command: str) -> list[Row]:
    work = "template + tokenise + mask + pack against datasets.map"
    rows = []
    for name in ("tags", "no tags"):
        for clock, bar in (("wall", 1.0), ("cpu", None)):
            mine, theirs = ([count / getattr(run, clock) for run in done[side]] for side in (name, "peer"))
            figure = work if clock == "wall" else f"{work}, by CPU time"
            case = f"{count} chats, {name}"
            rows.append(
                row(figure, case, mine, theirs, unit="chats/s", at_least=bar, packages=PACKAGES, command=command)
            )
    fills = [run.fill for run in done["tags"]]
    case = f"{count} chats, capacity 4096"
    rows.append(row("fill of bins", case, fills, unit="share", at_least=0.98, packages=PACKAGES, command=command))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^4 chats instead of 10^5")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--machine", default="cpu2")
    chosen = parser.parse_args()
    command = "python -m benchmarks.data" + (" --quick" if chosen.quick else "") + f" --runs {chosen.runs}"
    write("data", chosen.machine, measure(10_000 if chosen.quick else 100_000, chosen.runs, command))


if __name__ == "__main__":
    main()
