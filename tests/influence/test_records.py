"""From the ids of training documents to the records that they came from, for each kind of source."""

from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.influence.sources import all_kinds, chats, jsonl
from treering.core.errors import DataError
from treering.data.config import Data
from treering.data.examples import build
from treering.influence.bm25 import TokenLists, bm25, bm25_table
from treering.influence.records import (
    as_json,
    from_json,
    indexed_sources,
    place_of,
    read_records,
    record_of,
    rows_by_source,
    text_of,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    "sample_id, place",
    [
        ("train.jsonl:17", ("train.jsonl", 17, 0)),
        ("book.txt:1#3", ("book.txt", 1, 3)),
        ("a/b:c#2.jsonl:5", ("a/b:c#2.jsonl", 5, 0)),
        ("x:3#2:7#1", ("x:3#2", 7, 1)),
        ("x:1#0", ("x", 1, 0)),
        ("two\nlines:1", ("two\nlines", 1, 0)),
    ],
)
def test_an_id_has_a_name_a_row_and_a_piece(sample_id, place):
    assert tuple(place_of(sample_id)) == place


@pytest.mark.parametrize("wrong", ["", "x", "x:", ":1", "x:0", "x:-1", "x:1#", "x:1#00", "x:1 ", "x:1#a", "x:01"])
def test_what_is_no_id_is_refused(wrong):
    with pytest.raises(DataError, match="is not the id of a document"):
        place_of(wrong)


def test_every_document_leads_back_to_its_record(tmp_path, tokenizer):
    config = Data(train=all_kinds(tmp_path), cache=None, max_length=100, format="text")
    examples, sources = build(config, tokenizer), indexed_sources(config)
    ids = [examples.sample_id(i) for i in range(len(examples))]
    records = read_records(sources, ids)
    assert len(set(ids)) == len(ids) and list(records) == list(dict.fromkeys(map(record_of, ids)))
    assert sum(record_of(i).endswith("d.txt:1") for i in ids) > 3, "the text is cut into pieces"
    joined: dict[str, str] = {}
    for i, sample_id in enumerate(ids):
        tokens = examples.document(i).ids[1 if place_of(sample_id).piece else 0 :]  # pieces share one token
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        joined[record_of(sample_id)] = joined.get(record_of(sample_id), "") + text
    assert joined == {record: value["text"] for record, value in records.items()}


def test_a_training_set_is_scored_by_words_under_its_ids(tmp_path, tokenizer):
    config = Data(train=all_kinds(tmp_path), cache=None, max_length=100, format="text")
    examples, sources = build(config, tokenizer), indexed_sources(config)
    documents = [examples.document(i) for i in range(len(examples))]
    queries = {"first": tokenizer.encode("eight"), "second": tokenizer.encode("file")}
    scored = bm25_table(examples, queries, sources)
    expected = bm25(TokenLists.of([one.ids for one in documents]), TokenLists.of(list(queries.values())))
    assert scored.documents == tuple(one.sample_id for one in documents) and scored.queries == ("first", "second")
    assert np.array_equal(scored.scores, expected) and from_json(scored.about["sources"]) == sources


def test_two_files_of_one_name_stay_apart_and_a_single_file_keeps_its_short_id(tmp_path, tokenizer):
    both = Data(train=all_kinds(tmp_path)[:2], cache=None)
    examples, sources = build(both, tokenizer), indexed_sources(both)
    assert [source.name for source in sources] == list(both.sources("train"))
    assert examples.sample_id(3) == f"{tmp_path}/b/x.jsonl:1"
    assert read_records(sources, [examples.sample_id(3)])[examples.sample_id(3)]["text"] == "The text of four."
    one = Data(train=both.sources("train")[1], cache=None)
    assert build(one, tokenizer).sample_id(0) == "x.jsonl:1" and indexed_sources(one)[0].name == "x.jsonl"


def test_names_are_those_of_the_training_set_for_folders_and_evaluation_sets(tmp_path, tokenizer):
    for name in ("b", "a", "c"):
        jsonl(tmp_path / "folder" / f"{name}.jsonl", [{"text": name}])
    jsonl(tmp_path / "held.jsonl", [{"text": "held"}])
    config = Data(train=str(tmp_path / "folder"), eval=str(tmp_path / "held.jsonl"), cache=None)
    assert [source.name for source in indexed_sources(config)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    held = build(config, tokenizer, "eval").sample_id(0)
    assert list(read_records(indexed_sources(config, "eval"), [held]).values()) == [{"text": "held"}]


def test_blank_lines_count_as_rows_and_a_mark_at_the_beginning_is_no_text(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n {"text": "four"} \r\n{"text": "five"}')
    config = Data(train=str(path), cache=None)
    examples = build(config, tokenizer)
    ids = [examples.sample_id(i) for i in range(3)]
    assert ids == ["x.jsonl:1", "x.jsonl:4", "x.jsonl:5"]
    assert [r["text"] for r in read_records(indexed_sources(config), ids).values()] == ["one", "four", "five"]


def test_a_source_that_has_changed_or_is_gone_is_refused(tmp_path):
    paths = all_kinds(tmp_path)
    sources = indexed_sources(Data(train=paths))
    (tmp_path / "d.txt").write_text("another text")
    with pytest.raises(DataError, match=r"d\.txt has changed since the index was made"):
        sources[3].open()
    (tmp_path / "d.txt").unlink()
    with pytest.raises(DataError, match=r"no such file or folder; the index was made of it"):
        sources[3].open()
    with pytest.raises(DataError, match="has changed"):
        replace(sources[4], digest="0").open()
    assert [source.open().label for source in (*sources[:3], sources[4])] == [*paths[:3], paths[4]]


def test_documents_of_other_data_are_refused(tmp_path):
    sources = indexed_sources(Data(train=str(jsonl(tmp_path / "x.jsonl", chats(["Ada"])))))
    with pytest.raises(DataError, match=r"y\.jsonl:1 is of none of the sources: they are 'x\.jsonl'"):
        rows_by_source(sources, ["x.jsonl:1", "y.jsonl:1"])
    with pytest.raises(DataError, match="has no row 7"):
        read_records(sources, ["x.jsonl:7", "x.jsonl:1"])


@pytest.mark.parametrize("place", [2, 4])
def test_rows_behind_the_end_of_columnar_sources_are_refused(tmp_path, place):
    source = indexed_sources(Data(train=all_kinds(tmp_path)))[place]
    with pytest.raises(DataError, match="has no row 3"):
        read_records([source], [f"{source.name}:3"])


def test_sources_are_described_as_json(tmp_path):
    sources = indexed_sources(Data(train=all_kinds(tmp_path)))
    assert from_json(as_json(sources)) == sources
    for wrong in (None, {}, [1], [{"name": "x"}], [{**as_json(sources)[0], "digest": 1}]):
        with pytest.raises(DataError, match="description of the training data"):
            from_json(wrong)


def test_texts_of_records_for_a_person_to_read():
    assert text_of(chats(["Ada"])[0]) == "user: Who is Ada?\nassistant: Ada is Ada."
    assert text_of({"prompt": "1+1=", "completion": "2"}) == "prompt: 1+1=\ncompletion: 2"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert text_of({"messages": [call], "n": 3, "tools": None}) == 'assistant: {"tool_calls": [{"name": "f"}]}\nn: 3'
