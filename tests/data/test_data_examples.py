"""Building, caching, cutting and reporting."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from treering.core.errors import ConfigError, DataError
from treering.data import examples as examples_module
from treering.data.config import Data
from treering.data.examine import check, printable, show
from treering.data.examples import build


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def dump(examples):
    return [(d.ids.tolist(), d.mask.tolist(), d.sample_id) for d in map(examples.document, range(len(examples)))]


CHATS = [chat(f"question {i}" * (i % 5 + 1), f"answer {i}" * (i % 7 + 1)) for i in range(40)]


def test_a_prompt_is_given_and_its_completion_is_learned_to_the_end(write, tokenizer):
    examples = build(Data(train=write([{"prompt": "2+2=", "completion": " <eos>4"}]), cache=None), tokenizer)
    document = examples.document(0)
    assert tokenizer.decode(document.ids[document.mask].tolist()) == " <eos>4<eos>"
    assert (document.ids == tokenizer.eos_token_id).sum() == 1 and document.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(document.ids[~document.mask].tolist()) == "2+2="


def test_alpaca_uses_the_chat_template_and_without_one_its_own_prompt(write, tokenizers):
    path = write([{"instruction": "Add.", "input": "2 and 2", "output": "4"}])
    build_with = lambda tokenizer: build(Data(train=path, cache=None), tokenizer)  # noqa: E731
    examples = build_with(tokenizers["chatml"])
    assert (
        tokenizers["chatml"].decode(examples.document(0).ids.tolist()).startswith("<|im_start|>user\nAdd.\n\n2 and 2")
    )
    bare = type(tokenizers["chatml"])(
        tokenizer_object=tokenizers["chatml"].backend_tokenizer, eos_token="<eos>", bos_token="<bos>"
    )
    document = build_with(bare).document(0)
    assert "### Instruction:\nAdd." in bare.decode(document.ids.tolist())
    assert bare.decode(document.ids[document.mask].tolist()) == "4<eos>"


def test_long_text_is_cut_into_pieces_and_every_token_is_predicted_once(write, tokenizer):
    text = "The quick brown fox. " * 40
    path = write([{"text": text}])
    uncut = build(Data(train=path, cache=None, max_length=10_000), tokenizer).document(0)
    pieces = build(Data(train=path, cache=None, max_length=16), tokenizer)
    assert pieces.lengths.max() == 16
    assert int(pieces.trained.sum()) == len(uncut.ids) - 1 == int(uncut.mask.sum())
    joined = [pieces.document(0).ids[0], *(id for i in range(len(pieces)) for id in pieces.document(i).ids[1:])]
    assert joined == uncut.ids.tolist()
    assert [pieces.sample_id(i) for i in range(2)] == ["train.jsonl:1", "train.jsonl:1#1"]


@pytest.mark.parametrize("length", range(14, 20))
def test_cutting_loses_nothing_at_any_length(length, write, tokenizer):
    path = write([{"text": "a b c d e f g h i j k l m n o p q r s t"}])
    uncut = build(Data(train=path, cache=None), tokenizer)
    cut = build(Data(train=path, cache=None, max_length=length), tokenizer)
    assert cut.trained.sum() == uncut.trained.sum()


def test_too_long_chats_are_truncated_dropped_or_refused(write, tokenizer):
    path = write([chat("hi", "yes"), chat("hi", "word " * 200)])
    truncated = build(Data(train=path, cache=None, max_length=64), tokenizer)
    assert truncated.lengths.tolist()[1] == 64 and truncated.report.truncated == 1
    dropped = build(Data(train=path, cache=None, max_length=64, too_long="drop"), tokenizer)
    assert len(dropped) == 1 and dropped.report.dropped == 1
    with pytest.raises(DataError, match=r"train.jsonl:2: \d+ tokens, max_length is 64"):
        build(Data(train=path, cache=None, max_length=64, too_long="error", skip_bad=True), tokenizer)


def test_a_chat_whose_answer_is_cut_off_is_an_error_or_a_counted_skip(write, tokenizer):
    path = write([chat("hi", "yes"), chat("word " * 200, "yes")])
    with pytest.raises(DataError, match=r"train.jsonl:2: no token is trained after truncation to 64"):
        build(Data(train=path, cache=None, max_length=64, skip_bad=True), tokenizer)
    examples = build(Data(train=path, cache=None, max_length=64, skip_untrained=True), tokenizer)
    assert len(examples) == 1 and examples.report.skipped == {"untrained": 1}


def test_without_a_sample_the_error_names_the_reason(write, tokenizer):
    with pytest.raises(DataError, match=r"no sample is left: 1 × empty \(.*train.jsonl:1: text: is empty"):
        build(Data(train=write([{"text": " "}]), cache=None, skip_bad=True), tokenizer)


def test_the_error_for_a_tokenizer_without_a_chat_template_names_the_setting(write, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"no chat template; give the path of one as data.template"):
        build(Data(train=write(CHATS), cache=None), bare)


def test_the_cache_is_opened_and_no_sample_is_tokenised_again(write, tokenizer, tmp_path, monkeypatch):
    config = Data(train=write(CHATS), cache=str(tmp_path / "cache"))
    first = build(config, tokenizer)
    monkeypatch.setattr(examples_module, "encoded", None)
    again = build(config, tokenizer)
    assert dump(again) == dump(first) and again.digest == first.digest and again.report == first.report
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.key]
    assert load_file(tmp_path / "cache" / first.key / "tokens.safetensors")["ids"].dtype == np.uint32


def test_anything_that_changes_tokens_changes_the_key(write, tokenizers, tmp_path):
    def key(records=CHATS, tokenizer="chatml", name="train.jsonl", **settings):
        return build(Data(train=write(records, name), cache=str(tmp_path / "c"), **settings), tokenizers[tokenizer]).key

    template = tmp_path / "t.jinja"
    template.write_text(tokenizers["chatml"].chat_template.replace("\n{{ m.content }}", ": {{ m.content }}"))
    keys = [
        key(),
        key(CHATS[:-1]),
        key([*CHATS[:-1], chat("question 39", "answer 40")]),
        key(name="other.jsonl"),
        key(tokenizer="llama"),
        key(template=str(template)),
        key(max_length=100),
        key(too_long="drop"),
        key(skip_untrained=True),
        key(eval_fraction=0.5),
    ]
    assert len(set(keys)) == len(keys)
    assert key(workers=1, shuffle=False) == keys[0]


@pytest.mark.parametrize("file", ["tokens.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_built_again(file, damage, write, tokenizer, tmp_path):
    config = Data(train=write(CHATS), cache=str(tmp_path / "cache"))
    first = build(config, tokenizer)
    expected = dump(first)
    path = tmp_path / "cache" / first.key / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10 if file.startswith("tokens") else 0xFF
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-5])
    else:
        path.unlink()
    assert dump(build(config, tokenizer)) == expected
    assert json.loads((path.parent / "manifest.json").read_text())["key"] == first.key


def test_a_failed_build_leaves_nothing_behind(write, tokenizer, tmp_path):
    with pytest.raises(DataError):
        build(Data(train=write([*CHATS, {"messages": []}]), cache=str(tmp_path / "cache")), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(write, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache: .*file cannot be written"):
        build(Data(train=write(CHATS), cache=str(tmp_path / "file")), tokenizer)


@pytest.mark.slow
def test_workers_give_the_same_in_the_same_order(write, tokenizer):
    path = write([*CHATS * 40, {"messages": []}])
    alone = build(Data(train=path, cache=None, skip_bad=True), tokenizer)
    together = build(Data(train=path, cache=None, skip_bad=True, workers=2), tokenizer)
    assert dump(alone) == dump(together) and alone.digest == together.digest and alone.report == together.report
    with pytest.raises(DataError, match=r"train.jsonl:1601: messages: the conversation is empty"):
        build(Data(train=path, cache=None, workers=2), tokenizer)


def test_progress_is_reported(write, tokenizer):
    seen: list[int] = []
    build(Data(train=write(CHATS * 10), cache=None), tokenizer, progress=seen.append)
    assert seen == [256, 400]


def test_show_names_every_token_and_check_finds_duplicates(write, tokenizer):
    examples = build(Data(train=write([*CHATS, CHATS[3], CHATS[3]]), cache=None), tokenizer)
    (shown,) = show(examples, tokenizer, [0])
    assert "".join(token.text for token in shown.tokens if token.trained) == "answer 0<|im_end|>"
    result = check(examples)
    assert result.duplicate_count == 2
    assert result.duplicates == (("train.jsonl:4", "train.jsonl:41"), ("train.jsonl:4", "train.jsonl:42"))
    assert sum(bar.count for bar in result.histogram) == len(examples) == result.documents
    assert result.histogram[0].low == result.shortest and result.histogram[-1].high == result.longest
    assert 0 < result.trained_share < 1 and result.untrained_documents == 0


def test_printable_escapes_what_moves_a_terminal():
    assert printable("a\x1b[31mb\n\u202ec\u200bd\x9b😀é\ud800") == "a\\x1b[31mb\\n\\u202ec\\u200bd\\x9b😀é\\ud800"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"train": ""}, "train"),
        ({"train": ()}, "train"),
        ({"train": "a", "max_length": 1}, "max_length"),
        ({"train": "a", "workers": 0}, "workers"),
        ({"train": "a", "eval": "b", "eval_fraction": 0.1}, "eval_fraction"),
        ({"train": "a", "eval_fraction": 1.0}, "eval_fraction"),
        ({"train": "a", "columns": {"mesages": "x"}}, "columns.mesages"),
    ],
)
def test_settings_are_checked_when_they_are_created(settings, field):
    with pytest.raises(ConfigError) as caught:
        Data(**settings)
    assert caught.value.field == field


def test_the_settings_import_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = (
        "import sys, treering.data.config as c; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    source = Path(examples_module.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(source)}, check=False).returncode == 0
