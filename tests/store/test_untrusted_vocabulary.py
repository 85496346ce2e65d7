"""A tokenizer.json with ids or a normalizer that would fill the memory is refused before it is opened."""

import base64
import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import treering as tr
from treering.store.untrusted import open_tokenizer


@pytest.fixture
def folder(tmp_path):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return tmp_path


def changed(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def replacing(content, pattern=None):
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def test_an_ordinary_tokenizer_is_opened(folder):
    assert open_tokenizer(folder).get_vocab() == {"[UNK]": 0, "a": 1}


@pytest.mark.parametrize("id", [4 * 10**9, 1 << 21, 1.5, None, "7"])
def test_ids_far_beyond_the_number_of_tokens_are_refused(folder, id):
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": id}, "unk_token": "[UNK]"}
    with pytest.raises(tr.CheckpointError, match=r"tokenizer\.json has the token id .* refused"):
        open_tokenizer(changed(folder, model=model))
    token = {"id": id, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    with pytest.raises(tr.CheckpointError, match=r"tokenizer\.json has the token id .* refused"):
        open_tokenizer(changed(folder, added_tokens=[{**token, "normalized": False}]))


@pytest.mark.parametrize(
    "normalizer",
    [
        replacing("x" * 10**7),
        replacing("x" * 1000, {"Regex": ""}),
        {"type": "Sequence", "normalizers": [replacing("aa")] * 24},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replacing("aaa")] * 3}] * 3},
        {"type": "Prepend", "prepend": "x" * 10**6},
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\0\0\0\0" + b"x" * 9999).decode()},
    ],
    ids=["text", "expression", "chain", "nested", "prepended", "table"],
)
def test_normalizers_that_multiply_a_text_are_refused(folder, normalizer):
    with pytest.raises(tr.CheckpointError, match=r"can make a text .* times as long; more than 256 is refused"):
        open_tokenizer(changed(folder, normalizer=normalizer))


def test_normalizers_that_published_tokenizers_have_are_kept(folder):
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\0\0\0\0" + b"x" * 18).decode()}
    steps = [replacing('"', {"String": "``"}), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]
    blanks = replacing(" ", {"Regex": " {2,}"})
    from treering.store.untrusted.vocabulary import check_tokenizer

    state = json.loads((folder / "tokenizer.json").read_text())
    normalizer = {"type": "Sequence", "normalizers": [*steps, table, blanks]}  # as ALBERT's
    check_tokenizer({**state, "normalizer": normalizer}, folder / "tokenizer.json")


@pytest.mark.parametrize("normalizer", [5, [], {"type": "Replace"}, {"type": "Precompiled", "precompiled_charsmap": 3}])
def test_a_normalizer_of_another_form_is_refused(folder, normalizer):
    with pytest.raises(tr.CheckpointError, match="normalizer that cannot be read"):
        open_tokenizer(changed(folder, normalizer=normalizer))
