"""Every bad input is an error with file, line and field, or a counted skip; never anything else."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering.core.errors import DataError
from treering.data.config import Data
from treering.data.examples import build
from treering.data.formats import detect, parse
from treering.data.sources import reading as sources
from treering.data.sources.jsonl import read_jsonl
from treering.data.sources.records import Record, SampleError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def data(path, **settings) -> Data:
    return Data(train=path, **{"cache": None, **settings})


def turns_of(*contents, role="user"):
    return {"messages": [{"role": role, "content": content} for content in contents]}


def with_turn(**turn):
    return {"messages": [GOOD["messages"][0], turn]}


BAD = {
    "broken UTF-8": (b'{"text": "\xff"}', "utf-8", "not UTF-8"),
    "NUL byte": (b'{"text": "a\0"}', "nul", "NUL byte at byte 12"),
    "escaped NUL": ({"messages": [{"role": "user", "content": "a\0"}]}, "nul", r"messages\[0\].content: NUL character"),
    "lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "utf-8", "U\\+D800"),
    "noncharacter": (turns_of("\ufdd0"), "utf-8", "noncharacter"),
    "no JSON": (b'{"messages": [', "json", "not JSON"),
    "deep JSON": (b"[" * 100_000, "json", "nested"),
    "duplicate key": (b'{"messages": [], "messages": []}', "json", "'messages' is given twice"),
    "NaN": (b'{"messages": NaN}', "json", "NaN is not JSON"),
    "huge number": (b'{"messages": ' + b"1" * 5000 + b"}", "json", "digit"),
    "a list": (b"[1]", "schema", "contains a list"),
    "a long line": (b'{"text": "' + b"a" * 300_000 + b'"}', "long line", "longer than 200000 bytes"),
    "no messages": ({"message": []}, "schema", "messages: is missing; the record has message"),
    "null messages": ({"messages": None}, "schema", "messages: is null"),
    "messages no list": ({"messages": "hi"}, "schema", "must be a list"),
    "empty conversation": ({"messages": []}, "empty", "the conversation is empty"),
    "a message no object": ({"messages": ["hi"]}, "schema", r"messages\[0\]: must be an object"),
    "extra field": ({**GOOD, "scoer": 1}, "schema", "scoer: is not a field.*data.ignore"),
    "extra message field": (with_turn(role="assistant", content="a", x=1), "schema", r"messages\[1\].x"),
    "no role": (with_turn(content="a"), "schema", r"messages\[1\].role: is missing"),
    "wrong role": (with_turn(role="bot", content="a"), "role", r"messages\[1\].role: is 'bot'; allowed are"),
    "role no string": (with_turn(role=["a"], content="a"), "role", r"messages\[1\].role"),
    "no content": (with_turn(role="assistant"), "schema", r"messages\[1\].content: is missing"),
    "null content": (with_turn(role="assistant", content=None), "schema", r"messages\[1\].content: is null"),
    "content a list": (with_turn(role="assistant", content=["a"]), "schema", r"content: must be a string, not list"),
    "content a number": (with_turn(role="assistant", content=3), "schema", "must be a string, not int"),
    "silent assistant": (with_turn(role="assistant", content=" \n"), "empty", "says nothing"),
    "calls of a user": ({"messages": [{"role": "user", "tool_calls": [{}]}]}, "schema", "tool_calls: belongs to"),
    "calls no list": (with_turn(role="assistant", tool_calls={}), "schema", "tool_calls: must be a list"),
    "deep call": (
        with_turn(role="assistant", tool_calls=[{"function": json.loads("[" * 200 + "]" * 200)}]),
        "json",
        "nested more than",
    ),
    "late system": (
        {"messages": [*GOOD["messages"], {"role": "system", "content": "s"}]},
        "role order",
        r"messages\[2\].role: system comes after",
    ),
    "assistant first": (turns_of("a", role="assistant"), "role order", "speaks before any user"),
    "tool first": (turns_of("a", role="tool"), "role order", "a tool answers without"),
    "tools no list": ({**GOOD, "tools": "t"}, "schema", "tools: must be a list"),
    "only a system turn": (turns_of("be kind", role="system"), "untrained", "nothing to train on"),
    "only a user turn": (turns_of("hi"), "untrained", "nothing to train on"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_an_error_with_file_line_and_field(name, write, tokenizer):
    line, _, message = BAD[name]
    path = write([GOOD, line])
    with pytest.raises(DataError, match=f"train.jsonl:2: .*{message}"):
        build(data(path, format="messages", line_limit=200_000), tokenizer)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_skipped_and_counted_when_asked(name, write, tokenizer):
    line, kind, _ = BAD[name]
    path = write([GOOD, line, GOOD])
    examples = build(data(path, line_limit=200_000, skip_bad=True, skip_untrained=True), tokenizer)
    assert len(examples) == 2
    assert dict(examples.report.skipped) == {kind: 1}
    assert "train.jsonl:2" in examples.report.named[kind][0]
    assert examples.sample_id(1) == "train.jsonl:3"


def test_a_line_of_50_megabytes_is_skipped_without_reading_all_of_it(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "' + b"a" * 50_000_000 + b'"}\n' + json.dumps(GOOD).encode())
    records = list(read_jsonl(path, "train.jsonl", 1 << 20))
    assert [number for number, _ in records] == [1, 2]
    assert isinstance(records[0][1], SampleError) and records[1][1] == GOOD


def test_bom_crlf_blank_lines_and_no_last_newline_are_fine(tmp_path):
    path = tmp_path / "train.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert list(read_jsonl(path, "t", 1 << 20)) == [(1, GOOD), (4, GOOD)]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error_with_its_name(content, tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train.jsonl:1: the file has no record"):
        build(data(str(path)), tokenizer)
    other = tmp_path / "good.jsonl"
    other.write_text(json.dumps(GOOD))
    examples = build(data((str(path), str(other)), skip_bad=True), tokenizer)
    assert len(examples) == 1 and examples.report.skipped == {"empty file": 1}


TOKENS = [
    b'{"text":',
    b'"a"',
    b"}",
    b"\n",
    b"\r",
    b"\0",
    b"\xef\xbb\xbf",
    b"[",
    b"\xff",
    b"{}",
    b'{"a": "b"}\n',
    b"1e999",
]
ANYTHING = st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=ANYTHING)
def test_any_bytes_are_records_or_named_errors(content, tmp_path):
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    records = list(read_jsonl(path, "any.jsonl", 50))
    assert records
    for number, value in records:
        assert isinstance(value, dict) or str(value).startswith(f"any.jsonl:{number}: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELD = st.sampled_from(["role", "content", "tool_calls", "name", "thinking", "x"])
MESSAGE = st.dictionaries(FIELD, st.sampled_from(["user", "assistant", "system", "tool"]) | JSON, max_size=4)
RECORD = st.dictionaries(
    st.sampled_from(["messages", "tools", "prompt", "completion", "text", "instruction", "input", "output", "y"]),
    JSON | st.lists(MESSAGE | JSON, max_size=4),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(value=RECORD, format=st.sampled_from(["messages", "prompt", "alpaca", "text"]), columnar=st.booleans())
def test_any_record_is_a_sample_or_a_named_error(value, format, columnar):
    record = Record(file=0, row=3, where="f.jsonl:3", value=value, columnar=columnar)
    try:
        sample = parse(record, format, Data(train="f"))
    except SampleError as error:
        assert str(error).startswith("f.jsonl:3: ")
    else:
        assert sample.messages or sample.text


def test_formats_are_detected_from_the_fields(write, tokenizer):
    cases = {
        "messages": GOOD,
        "prompt": {"prompt": "a", "completion": "b"},
        "alpaca": {"instruction": "a", "input": "", "output": "b"},
        "text": {"text": "some words"},
    }
    for name, record in cases.items():
        assert build(data(write([b"{", record]), skip_bad=True), tokenizer).report.format == name
    with pytest.raises(DataError, match=r"the record has the fields conversation; known formats .* data.columns"):
        build(data(write([{"conversation": []}])), tokenizer)


def test_columns_are_renamed_and_ignored(write, tokenizer):
    path = write([{"dialog": GOOD["messages"], "meta_id": 3, "meta_tag": None}])
    examples = build(data(path, columns={"messages": "dialog"}, ignore=("meta_*",)), tokenizer)
    assert len(examples) == 1
    with pytest.raises(DataError, match=r"train.jsonl:1: dialog: is missing; the record has messages"):
        build(data(write([GOOD]), columns={"messages": "dialog"}, format="messages"), tokenizer)


def test_parquet_rows_are_read_and_named(tmp_path, tokenizer):
    path = str(tmp_path / "train.parquet")
    rows = [GOOD, {"messages": [{"role": "user", "content": "x", "name": "n"}, {"role": "assistant", "content": None}]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"train.parquet:2: messages\[1\].content: is missing"):
        build(data(path), tokenizer)
    examples = build(data(path, skip_bad=True), tokenizer)
    assert len(examples) == 1 and examples.sample_id(0) == "train.parquet:1"


# Two strings of which the second is not UTF-8: Arrow does not look.
BROKEN = pa.Array.from_buffers(pa.string(), 2, [None, pa.array(["ab", "cd"]).buffers()[1], pa.py_buffer(b"ab\xff\xff")])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"text": pa.array([1, 2])}), r"train.parquet:1: text: must be a string, not int"),
        (pa.table({"text": pa.array([b"a"], pa.binary())}), r"train.parquet:1: text: must be a string, not bytes"),
        (pa.table({"a": ["b"]}), r"train.parquet:1: the format is not recognised"),
        (pa.table({"text": pa.array([], pa.string())}), r"train.parquet:1: the file has no row"),
        (pa.table({"text": pa.array(["ok", None])}), r"train.parquet:2: text: is null"),
        (pa.table({"text": BROKEN}), r"train.parquet:2: not UTF-8"),
    ],
)
def test_a_wrong_parquet_schema_is_an_error_with_its_row(table, message, tmp_path, tokenizer):
    path = str(tmp_path / "train.parquet")
    pq.write_table(table, path)
    with pytest.raises(DataError, match=message):
        build(data(path), tokenizer)


def test_a_file_that_is_no_parquet_is_a_data_error(tmp_path, tokenizer):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a b c"] * 2000}), path)
    intact = path.read_bytes()
    for damaged in (b"PAR1", b"", intact[: len(intact) // 2], intact[:8] + b"\xff" * 60 + intact[68:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train.parquet:1: not readable as parquet"):
            build(data(str(path)), tokenizer)


def test_a_folder_is_read_by_name_and_text_files_are_documents(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_bytes("\ufeffsecond text\n\nstill the second".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "first text"}\n')
    pq.write_table(pa.table({"text": ["third text"]}), tmp_path / "c.parquet")
    (tmp_path / "notes.md").write_text("not read")
    examples = build(data(str(tmp_path)), tokenizer)
    texts = [tokenizer.decode(examples.document(i).ids.tolist()) for i in range(len(examples))]
    assert texts == ["first text<eos>", "second text\n\nstill the second<eos>", "third text<eos>"]
    assert [examples.sample_id(i) for i in range(3)] == ["a.jsonl:1", "b.txt:1", "c.parquet:1"]


def test_a_dataset_saved_to_disk_is_read(tmp_path, tokenizer):
    import datasets

    folder = str(tmp_path / "saved")
    parts = {"train": datasets.Dataset.from_list([GOOD, GOOD]), "test": datasets.Dataset.from_list([GOOD])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert len(build(data(folder), tokenizer)) == 2
    assert len(build(data(folder, split="test"), tokenizer)) == 1
    with pytest.raises(DataError, match="there is no split 'dev'; it has train, test"):
        build(data(folder, split="dev"), tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.jsonl", "nothing.jsonl: there is no such file or folder"),
        ("./nothing", "there is no such file or folder"),
        ("table.csv", "files of the kind '.csv' are not read"),
        ("empty", "the folder has no .jsonl"),
    ],
)
def test_a_source_that_does_not_exist_is_named(source, message, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        build(data(source), tokenizer)


def test_held_out_records_are_disjoint_and_duplicates_stay_together(write):
    path = write([{"text": f"text {i % 50}"} for i in range(200)])
    config = data(path, eval_fraction=0.3)
    files = sources.open_sources(config.sources("train"), "train")
    train, held_out = ([r.value["text"] for r in sources.read(files, config, which)] for which in ("train", "eval"))
    assert len(train) + len(held_out) == 200 and held_out and train
    assert not set(train) & set(held_out)


def test_detection_without_a_record_repeats_the_first_error(write):
    record = Record(file=0, row=1, where="f:1", value=SampleError("f:1: broken", kind="json"))
    with pytest.raises(DataError, match="f:1: broken"):
        detect([record], Data(train="f"))
