"""Configuration text to values and lines: what is read, what is refused, and that nothing else can happen."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.cli.parsing import ConfigErrors, nodes, read_file, read_text


def refusal(text: str | bytes, name: str = "run.yaml") -> str:
    with pytest.raises(ConfigErrors) as caught:
        read_text(text, name=name)
    return str(caught.value)


@pytest.fixture(params=["C", "Python"])
def parser(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(nodes, "Composer", nodes.PythonComposer)
    elif nodes.Composer is nodes.PythonComposer:
        pytest.skip("PyYAML was built without libyaml")


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("[1, a, 1e3]", [1, "a", 1000.0]),
        ("{b: [x]}", {"b": ["x"]}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_words_mean_what_yaml_1_2_says(written, value):
    read = read_text(f"a: {written}\n").values["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 010\n", 2, "write 10, 0o10 for an octal number"),
        ("a: -007.5\n", 1, "write -7.5"),
        ("a: 1\na: 2\n", 2, "already given in line 1"),
        ("a:\n\tb: 1\n", 2, "tab"),
        ("a: [1,\n2]\nb: }\n", 3, "not YAML"),
        ("a: .nan\n", 1, "not a finite number"),
        ("a: -.inf\n", 1, "not a finite number"),
        ("a: 1e999\n", 1, "too large"),
        ("a: 99999999999999999999999\n", 1, "digits"),
        ("a: 9223372036854775808\n", 1, "64 bits"),
        ("a: !!python/object/apply:os.system [x]\n", 1, "tag"),
        ("a: !!int 3\n", 1, "tag"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("x: &b {c: 1}\na:\n  <<: *b\n", 3, "merge keys"),
        ("a: *nowhere\n", 1, "anchor"),
        ("a: &a [*a]\n", 1, "anchor"),
        ("? [1]\n: 2\n", 1, "a key is a list"),
        ('"": 2\n', 1, "a key is empty"),
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("a: b: c\n", 1, "quotes"),
        ("a: 1\nb: \x01\n", 2, "control character"),
        ("[" * 5000, 1, "too deeply"),
        ("a: " + "{b: " * 40 + "1" + "}" * 40, 1, "too deeply"),
        ('a: "\\0"\n', 1, "NUL"),
    ],
)
def test_a_trap_is_refused_with_its_line(text, line, says):
    message = refusal(text)
    assert says in message
    assert f"run.yaml:{line}\n" in message


def test_a_top_level_that_is_no_mapping_is_refused():
    assert "left margin" in refusal("[1]")
    assert "left margin" in refusal("just words")


def test_an_empty_file_is_an_empty_configuration():
    assert read_text("").values == read_text("# nothing\n").values == {}


def test_an_alias_is_followed_and_is_a_copy():
    values = read_text("a: &x {b: [1]}\nc: *x\n").values
    assert values == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert values["a"] is not values["c"]


def test_an_alias_bomb_stops_early():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "more than 20,000 values" in refusal("\n".join(lines))


def test_aliases_cannot_nest_beyond_the_depth():
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60)]
    assert "too deeply" in refusal("\n".join(lines))


def test_a_large_file_is_refused_before_it_is_parsed():
    assert "1,000,000 bytes" in refusal(b"a: " + b"x" * 2_000_000)


def test_what_is_not_utf_8_is_refused_and_a_bom_is_not():
    assert "run.yaml:2" in refusal(b"a: 1\nb: \xff\n")
    assert "UTF-8" in refusal("a: 1".encode("utf-16"))
    assert read_text("a: é".encode("utf-8-sig")).values == {"a": "é"}


def test_every_value_knows_its_line():
    document = read_text("# first\na: 1\nb:\n  c:\n  - x\n  - d: 2\n", name="run.yaml")
    assert document.where(("a",)) == "run.yaml:2"
    assert document.where(("b", "c", 1, "d")) == "run.yaml:6"
    assert document.where(("b", "c", 1, "nothing", "there")) == "run.yaml:6"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,\n"a": 2}', "already given in line 1"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": }', "not JSON"),
        ("[" * 100_000, "too deeply"),
        ('{"a": "\\ud800"}', "surrogate"),
    ],
)
def test_json_is_held_to_the_same_rules(text, says):
    assert says in refusal(text, "run.json")


def test_json_with_tabs_and_escapes_is_read_with_lines():
    document = read_text('{\n\t"a": "\\ud83c\\udf33 \\u00e9 { [",\n\t"b": [1, {"c": null}]\n}', name="run.json")
    assert document.values == {"a": "🌳 é { [", "b": [1, {"c": None}]}
    assert document.where(("b", 1, "c")) == "run.json:3"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1), json_values, max_size=5))
def test_json_reads_as_the_json_module_reads_it(values):
    text = json.dumps(values)
    expected = json.loads(text)
    try:
        read = read_text(text, name="run.json").values
    except ConfigErrors as error:
        assert any(word in str(error) for word in ("NUL", "merge keys", "surrogate"))
        return
    assert read == expected


@settings(max_examples=150)
@given(st.binary(max_size=200) | st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,?~ \n\t0123456789.eE\\x", max_size=80))
def test_random_bytes_are_read_or_refused(data):
    for name in ("run.yaml", "run.json"):
        try:
            values = read_text(data, name=name).values
        except ConfigErrors as error:
            assert str(error).startswith(name)
            assert all(c.isprintable() or c == "\n" for c in str(error))
        else:
            assert all(isinstance(key, str) for key in values)
            assert not any(isinstance(v, float) and not math.isfinite(v) for v in values.values())


@settings(max_examples=100)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,?~ \n\t01.e\\xuU", max_size=60))
def test_the_python_parser_refuses_as_cleanly_as_the_c_parser(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "Composer", nodes.PythonComposer)
        with contextlib.suppress(ConfigErrors):
            read_text(text)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "train.yaml").write_text("a: 1")
    with pytest.raises(ConfigErrors, match=r"did you mean .*train\.yaml"):
        read_file(tmp_path / "trian.yaml")
    with pytest.raises(ConfigErrors, match="this is a folder"):
        read_file(tmp_path)
    with pytest.raises(ConfigErrors, match="cannot be read"):
        read_file("a\0b.yaml")
