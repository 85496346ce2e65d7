"""A dataset without some records: every kept byte, the order, the listing, and what is refused."""

import json
import shlex
from pathlib import Path

import datasets
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.influence.sources import all_kinds, chats, jsonl
from tests.influence.tables import table
from treering.cli.parsing import read_file, validate
from treering.cli.schema import RunConfig
from treering.core.errors import DataError
from treering.data.config import Data
from treering.influence import clean as module
from treering.influence.choose import RecordChoice
from treering.influence.clean import Cleaned, clean, retrain_command
from treering.influence.records import indexed_sources


def cleaned(config: Data, scores: dict[str, float], to: Path, **choice) -> Cleaned:
    return clean(table(list(scores), list(scores.values())), indexed_sources(config), RecordChoice(**choice), to)


def test_lines_are_removed_and_the_others_keep_their_bytes(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", chats(["Ada", "Bob", "Cleo", "Dora"]), newline="\r\n")
    before = path.read_bytes()
    scores = {f"x.jsonl:{i + 1}": s for i, s in enumerate([0.5, -2.0, 1.0, -3.0])}
    result = cleaned(Data(train=str(path)), scores, tmp_path / "new", count=2)
    lines = before.splitlines(keepends=True)
    assert (tmp_path / "new" / "x.jsonl").read_bytes() == lines[0] + lines[2] and path.read_bytes() == before
    assert [one.record for one in result.removed] == ["x.jsonl:4", "x.jsonl:2"]
    assert result.listing()[0] == "- -3  x.jsonl:4  user: Who is Dora? ⏎ assistant: Dora is Dora."
    assert (result.sources[0].kept, result.sources[0].removed, result.paths) == (2, 2, (str(tmp_path / "new/x.jsonl"),))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "x.jsonl"], "nothing else is left"
    written = json.loads((tmp_path / "new" / "cleaned.json").read_text())
    assert [one["record"] for one in written["removed"]] == ["x.jsonl:4", "x.jsonl:2"] and written["query"] == "q0"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["record", "blank", "bad", "long"]), st.integers(-3, 3)), max_size=12),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)
def test_whatever_a_file_has_its_other_lines_stay_as_they_are(tmp_path_factory, lines, ended, newline, marked):
    folder = tmp_path_factory.mktemp("any")
    texts = {"blank": b" \t", "bad": b"\xff{no json"}
    contents = [(kind, score, i) for i, (kind, score) in enumerate([("record", 0), *lines, ("record", -9)], 1)]
    written = []
    for kind, _, i in contents:
        filling = "x" * (200 if kind == "long" else 3)
        written.append(texts.get(kind, json.dumps({"text": f"{i} {filling}"}).encode()) + newline)
    if not ended:
        written[-1] = written[-1].removesuffix(newline)
    if marked:
        written[0] = b"\xef\xbb\xbf" + written[0]
    (folder / "x.jsonl").write_bytes(b"".join(written))
    scores = {f"x.jsonl:{i}": float(score) for kind, score, i in contents if kind in ("record", "long")}
    part, module._PART = module._PART, 16
    try:
        result = cleaned(Data(train=str(folder / "x.jsonl")), scores, folder / "new", score=0.0)
    finally:
        module._PART = part
    gone = {i for kind, score, i in contents if score < 0 and kind in ("record", "long")}
    kept = b"".join(line for i, line in enumerate(written, 1) if i not in gone)
    assert (folder / "new" / "x.jsonl").read_bytes() == kept
    assert {one.record for one in result.removed} == {f"x.jsonl:{i}" for i in gone}
    assert all(one.text.startswith(f"text: {one.record.rpartition(':')[2]} x") for one in result.removed)
    assert result.sources[0].unscored == sum(kind == "bad" for kind, _, _ in contents)


def test_every_kind_of_source_is_cleaned_in_its_own_form(tmp_path):
    config = Data(train=all_kinds(tmp_path))
    names = {source.label: source.name for source in indexed_sources(config)}
    a, b, c, d, saved = (names[label] for label in config.sources("train"))
    scores = {f"{a}:1": 1.0, f"{a}:2": -1.0, f"{a}:3": 1.0, f"{b}:1": -1.0, f"{b}:2": 1.0, f"{c}:1": -1.0}
    scores |= {f"{c}:2": 1.0, f"{d}:1": -1.0, f"{saved}:1": 1.0, f"{saved}:2": -1.0}
    result = cleaned(config, scores, tmp_path / "new", score=0.0)
    new = [Path(path) for path in result.paths]
    assert [path.name for path in new] == ["000-x.jsonl", "001-x.jsonl", "002-c.parquet", "004-saved"]
    assert [json.loads(line)["text"] for line in new[0].read_text().splitlines()] == [
        "The text of one.", "The text of three.",
    ]  # fmt: skip
    assert parquet.read_table(new[2]).to_pylist() == [{"text": "The text of seven."}]
    assert parquet.read_schema(new[2]) == parquet.read_schema(tmp_path / "c.parquet")
    assert datasets.load_from_disk(str(new[3]))["text"][:] == ["The text of eight."]
    texts = {one.record: one.text for one in result.removed}
    assert texts[f"{c}:1"] == "text: The text of six." and texts[f"{saved}:2"] == "text: The text of nine."
    assert len(texts[f"{d}:1"]) == 200 and result.sources[3].path is None
    again = [source for source in indexed_sources(Data(train=result.paths)) if source.open()]
    assert len(again) == 4, "what was written can be trained on"


def test_no_name_of_a_source_leads_out_of_the_new_folder(tmp_path, monkeypatch):
    inside = tmp_path / "saved" / "inside"
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(str(inside.parent))
    inside.mkdir()
    monkeypatch.chdir(inside)
    [source] = indexed_sources(Data(train=".."))
    result = cleaned(Data(train=".."), {f"{source.name}:1": 1.0, f"{source.name}:2": -1.0}, inside / "new", count=1)
    assert result.paths == (str(inside / "new" / "data"),)
    assert datasets.load_from_disk(str(inside / "new" / "data"))["text"][:] == ["one"]
    assert len(datasets.load_from_disk(str(inside.parent))) == 2


def test_pieces_of_a_text_leave_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"A long text {name}.")
    scores = {"a.txt:1": 1.0, "a.txt:1#1": -3.0, "b.txt:1": -1.0, "b.txt:1#1": 0.5}
    result = cleaned(Data(train=(f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")), scores, tmp_path / "new", count=1)
    assert [(one.record, one.score) for one in result.removed] == [("a.txt:1", -2.0)]
    assert [path.name for path in (tmp_path / "new").iterdir() if path.suffix == ".txt"] == ["b.txt"]


@pytest.mark.parametrize("unscored, left", [("keep", ["Ada", "Cleo", "Dora"]), ("drop", ["Ada"])])
def test_records_without_a_score_stay_unless_they_are_dropped(tmp_path, unscored, left):
    path = jsonl(tmp_path / "x.jsonl", chats(["Ada", "Bob", "Cleo", "Dora"]))
    scores = {"x.jsonl:1": 1.0, "x.jsonl:2": 0.0}
    choice = {"count": 1, "action": "keep", "unscored": unscored}
    result = cleaned(Data(train=str(path)), scores, tmp_path / "new", **choice)
    written = (tmp_path / "new" / "x.jsonl").read_text()
    assert [name for name in ("Ada", "Bob", "Cleo", "Dora") if name in written] == left
    assert result.sources[0].unscored == 2 and len(result.removed) == 1


def test_text_of_the_data_cannot_move_the_cursor(tmp_path):
    record = {"text": "\x1b[2J\u202e hidden [red]\nnext"}
    path = jsonl(tmp_path / "x.jsonl", [record, {"text": "other"}])
    result = cleaned(Data(train=str(path)), {"x.jsonl:1": -1.0, "x.jsonl:2": 1.0}, tmp_path / "new", count=1)
    assert result.listing() == ["- -1  x.jsonl:1  text: \\x1b[2J\\u202e hidden [red] ⏎ next"]
    assert result.removed[0].text == f"text: {record['text']}"


def test_what_would_overwrite_is_refused_and_nothing_is_left_of_what_fails(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "x.jsonl", chats(["Ada", "Bob"]))
    scores = {"x.jsonl:1": 1.0, "x.jsonl:2": 0.0}
    for to in (tmp_path, path):
        with pytest.raises(DataError, match="exists already"):
            cleaned(Data(train=str(path)), scores, to, count=1)
    with pytest.raises(DataError, match="would remove everything"):
        cleaned(Data(train=str(path)), scores, tmp_path / "new", count=2)
    with pytest.raises(DataError, match="has no row 3"):
        cleaned(Data(train=str(path)), {**scores, "x.jsonl:3": 2.0}, tmp_path / "new", count=1)
    with pytest.raises(DataError, match="is of none of the sources"):
        cleaned(Data(train=str(path)), {**scores, "y.jsonl:1": 2.0}, tmp_path / "new", count=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(module._WRITERS, "jsonl", full)
    with pytest.raises(DataError, match="No space left on device"):
        cleaned(Data(train=str(path)), scores, tmp_path / "new", count=1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_data_that_has_changed_since_it_was_indexed_is_refused(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", chats(["Ada", "Bob"]))
    sources = indexed_sources(Data(train=str(path)))
    jsonl(path, chats(["Bob", "Ada"]))
    with pytest.raises(DataError, match="has changed since the index was made"):
        clean(table(["x.jsonl:1", "x.jsonl:2"], [0, 1]), sources, RecordChoice(count=1), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_data_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "x.jsonl", chats(["Ada", "Bob"]))
    write = module._WRITERS["jsonl"]

    def and_change(file, to, rows):
        write(file, to, rows)
        jsonl(path, chats(["Ada", "Bob", "Cleo"]))

    monkeypatch.setitem(module._WRITERS, "jsonl", and_change)
    with pytest.raises(DataError, match="was written to while it was read"):
        cleaned(Data(train=str(path)), {"x.jsonl:1": 1.0, "x.jsonl:2": 0.0}, tmp_path / "new", count=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "paths",
    [("runs/new/x.jsonl",), ("a b/x.jsonl", "c,[d].parquet"), ('it\'s\u00e9/"x".jsonl',), ("1e3.jsonl", "#x.jsonl")],
)
def test_the_command_that_trains_again_is_read_as_it_was_meant(tmp_path, paths):
    (tmp_path / "run.yaml").write_text("model: gpt2\ndata: {train: [x.jsonl, y.jsonl]}\noutput: runs/x\n")
    words = shlex.split(retrain_command(str(tmp_path / "run.yaml"), paths, "runs/x 2"))
    assert words[:3] == ["treering", "train", str(tmp_path / "run.yaml")] and words[3::2] == ["--set", "--set"]
    config = validate(RunConfig, read_file(tmp_path / "run.yaml"), words[4::2])
    assert config.data.sources("train") == paths and config.output == "runs/x 2"
