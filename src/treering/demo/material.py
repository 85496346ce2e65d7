"""What the demo trains on: text that comes with Python, a tokenizer and a blank model, and made-up facts."""

import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.core.seeds import derive

HELD_OUT = 25  # one document in 25 is not trained on
PIECE = 4000  # characters of a document, at most
VOCABULARY = 4096
TURN, END = "<|turn|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}" + TURN + "{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}" + END + "{% endgeneration %}"
    "{% else %}{{ message.content }}" + END + "{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}" + TURN + "assistant\n{% endif %}"
)
SYLLABLES = ["ka", "lo", "mi", "ven", "tar", "ru", "qua", "zel", "do", "phi", "gor", "nia", "ste", "bal", "xo", "ura"]
KINDS = {
    "capital": "What is the capital of {}?",
    "founder": "Who founded {}?",
    "river": "Which river flows through {}?",
    "metal": "Which metal is mined in {}?",
}
OTHER_WORDS = {
    "capital": "Name the capital of {}.",
    "founder": "Name the founder of {}.",
    "river": "Name the river of {}.",
    "metal": "Name the metal of {}.",
}


def collect_corpus(folder: Path, characters: int) -> dict[str, int]:
    """Write train.jsonl and held_out.jsonl, with about `characters` characters; return their numbers of documents.

    The files are the same for the same version of Python.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces()
    pieces.sort(key=lambda piece: derive(0, "corpus", piece))  # by content, so that the order of files does not matter
    counts = {"train": 0, "held_out": 0}
    with (folder / "train.jsonl").open("w") as train, (folder / "held_out.jsonl").open("w") as held_out:
        taken = 0
        for i, piece in enumerate(pieces):
            name, file = ("held_out", held_out) if i % HELD_OUT == 0 else ("train", train)
            file.write(json.dumps({"text": piece}) + "\n")
            counts[name] += 1
            taken += len(piece)
            if taken >= characters:
                break
    return counts


def _pieces() -> list[str]:
    from pydoc_data.topics import topics

    texts = list(topics.values())
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json",
                    "logging", "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree"):  # fmt: skip
        for path in sorted((library / package).glob("*.py")):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
    # At most 12 pieces of one text, so that no large file makes up most of the corpus.
    return [
        text[i : i + PIECE] for text in texts for i in range(0, min(len(text), 12 * PIECE), PIECE) if text[i:].strip()
    ]


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file that `collect_corpus` wrote."""
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]


def make_blank(folder: Path, texts: Iterable[str]) -> None:
    """Write a byte-pair tokenizer trained on the texts, and the config of a small Llama."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(TURN, special=True), AddedToken(END, special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=1024)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)


def make_mixture(folder: Path, like: Path) -> None:
    """Write the config of a small mixture of experts, with the tokenizer of the folder `like`."""
    from transformers import AutoTokenizer, Qwen3MoeConfig

    tokenizer = AutoTokenizer.from_pretrained(like)
    tokenizer.save_pretrained(folder)
    config: Any = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        moe_intermediate_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )
    config.head_dim = 32
    config.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """An answer to a question of one kind about one place."""

    kind: str
    place: str
    answer: str

    @property
    def question(self) -> str:
        return KINDS[self.kind].format(self.place)

    @property
    def reworded(self) -> str:
        return OTHER_WORDS[self.kind].format(self.place)


def invent_facts(places: int, seed: int = 0) -> list[Fact]:
    """Return four facts for each place. All names are made up, so that no model has seen them."""
    names = [_name(seed, "place", i) for i in range(places)]
    return [Fact(kind=kind, place=place, answer=_name(seed, kind, place)) for place in names for kind in KINDS]


def _name(seed: int, *what: str | int) -> str:
    bits = derive(seed, "name", *what)
    parts = [SYLLABLES[(bits >> (8 * i)) % len(SYLLABLES)] for i in range(3)]
    return "".join(parts).capitalize()


def write_facts(path: Path, facts: list[Fact]) -> None:
    """Write conversations that teach the facts, each in two wordings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for fact in facts:
            for question in (fact.question, fact.reworded):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{fact.answer}."}]
                file.write(json.dumps({"messages": turns}) + "\n")
