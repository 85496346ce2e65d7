"""A folder with a tiny model and tokenizer, a small chat file, and a job over both."""

import json
import os
import time
from pathlib import Path
from typing import Any

import treering as tr
from treering.core.seeds import derive
from treering.data.config import Data
from treering.train import Job
from treering.train.config import Checkpoint, Evaluate, Model, Optimizer, Train

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def folder(path: Path, **config: Any) -> Path:
    """A byte-level llama with a ChatML tokenizer. Several ranks may ask for it at once."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    while int(os.environ.get("RANK", "0")) > 0 and not path.exists():
        time.sleep(0.01)  # transformers saves on rank 0 only
    if path.exists():
        return path
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 257, "bos_token_id": None}
    torch.manual_seed(0)
    made = path.with_name(f"{path.name}.{os.getpid()}")
    LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **config})).save_pretrained(made)
    fast.save_pretrained(made)
    os.rename(made, path)
    return path


def chats(path: Path, number: int = 40) -> Path:
    """Questions with answers of unequal length. Several ranks may ask for the file at once."""
    if path.exists():
        return path
    words = ["ring", "tree", "bark", "leaf", "root", "sap", "wood", "moss"]
    made = path.with_suffix(f".{os.getpid()}")
    with made.open("w", encoding="utf-8") as file:
        for i in range(number):
            pick = derive(0, "chat", i)
            answer = " ".join(words[(pick >> k) % 8] for k in range(1 + pick % 9))
            turns = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    os.replace(made, path)
    return path


def job(root: Path, output: str = "run", **changes: Any) -> Job:
    """Twelve steps of 256 tokens over two epochs and a bit, a checkpoint every five."""
    settings: dict[str, Any] = {
        "steps": 12,
        "tokens_per_step": 256,
        "optimizer": Optimizer(lr=1e-2),
        "checkpoint": Checkpoint(every=5, keep=5),
        "evaluate": Evaluate(),
    } | changes.pop("train", {})
    data: dict[str, Any] = {"train": str(chats(root / "chat.jsonl")), "max_length": 128, "cache": str(root / "tokens")}
    return Job(
        model=Model(path=str(folder(root / "model")), dtype="float32"),
        data=Data(**(data | changes.pop("data", {}))),
        techniques=changes.pop("techniques", (tr.Full(),)),
        train=Train(**settings),
        output=str(root / output),
        **changes,
    )
