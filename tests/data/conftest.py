import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.data_templates import SPECIAL, STRUCTURAL, TEMPLATES

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backend() -> str:
    """A byte-level BPE trained on text that comes with Python, with the control tokens of all templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in STRUCTURAL])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def tokenizers(backend: str) -> dict[str, PreTrainedTokenizerFast]:
    """A tokenizer for each template."""
    tokenizers_by_template = {}
    for name, template in TEMPLATES.items():
        tokenizers_by_template[name] = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend), bos_token="<bos>", eos_token="<eos>"
        )
        tokenizers_by_template[name].chat_template = template
    return tokenizers_by_template


@pytest.fixture
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["chatml"]


@pytest.fixture
def write(tmp_path: Path):
    """write(records) -> the path of a jsonl file; a record may be raw bytes of a line."""

    def writes(records: list, name: str = "train.jsonl") -> str:
        lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return writes
