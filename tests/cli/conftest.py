"""A folder with a model's config, a tokenizer and a chat template, data next to it, and a configuration of both."""

import json

import pytest


@pytest.fixture
def chat(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = tmp_path / "model"
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    ).save_pretrained(folder)
    turns = [("Hello [red]", "Hi \x1b[2J there"), ("One", "Two"), ("One", "Two")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]})
        for u, a in turns
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {folder}\ndata: {{train: {tmp_path / 'chat.jsonl'}, cache: null}}\n"
        f"techniques: {{full: , shard: }}\noutput: {tmp_path / 'run'}\n"
    )
    return file
