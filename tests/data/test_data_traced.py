"""Traced strings equal those that Python computes, and the origin of each character is true."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data.chat.conversation import left_out, pieces_of, trace, traced
from treering.data.chat.filters import to_json
from treering.data.chat.traced import Traced, concat, opaque, plain, plain_inside
from treering.data.chat.traced_parts import MixedTextsError, TextSource

TEXT = st.text(st.sampled_from("ab \n\t<|é😀\"\\'%"), max_size=12)
SOME = st.one_of(st.none(), st.sampled_from(["a", " ", "b<", "\n", "ab"]))


def source(text: str, turn: int = 0) -> Traced:
    return traced(text, turn, ("content",), [], True)


def proved(result: str) -> str:
    """Return the plain text, after comparing each character with its origin."""
    if isinstance(result, Traced):
        assert sum(part.length for part in result._parts) == len(result)
        at = 0
        for part in result._parts:
            shown = plain(result)[at : at + part.length]
            if part.source is not None and part.stop - part.start == part.length:
                assert shown == part.source.text[part.start : part.stop]
            at += part.length
    return plain(result)


SAME = {
    "add": lambda a, b: a + b,
    "radd": lambda a, b: b + a,
    "slice": lambda a, b: a[1:-1],
    "backwards": lambda a, b: a[::-1],
    "first": lambda a, b: a[:1] + a[-3:],
    "strip": lambda a, b: a.strip(),
    "lstrip": lambda a, b: a.lstrip("a "),
    "rstrip": lambda a, b: a.rstrip(b or None),
    "replace": lambda a, b: a.replace("a", b),
    "times": lambda a, b: a * 3,
    "join": lambda a, b: a.join([b, a, b]),
    "characters": lambda a, b: "".join(a),
    "prefix": lambda a, b: a.removeprefix(b).removesuffix("b"),
    "percent": lambda a, b: "%" + a,
}


@settings(max_examples=60, deadline=None)
@given(text=TEXT, other=TEXT)
@pytest.mark.parametrize("name", SAME)
def test_results_are_those_of_python_and_their_origins_are_true(name, text, other):
    result = SAME[name](source(text), other)
    assert proved(result) == SAME[name](text, other)
    if name != "characters":  # Python's join drops origins: the sandbox replaces it
        both = SAME[name](source(text), source(other, 0))
        assert proved(both) == SAME[name](text, other)


@settings(max_examples=100, deadline=None)
@given(text=TEXT, by=SOME, most=st.integers(-1, 3))
def test_pieces_of_a_split_are_found_where_they_are(text, by, most):
    for split in ("split", "rsplit"):
        result = getattr(source(text), split)(by, most)
        assert [proved(piece) for piece in result] == getattr(text, split)(by, most)
    assert [proved(line) for line in source(text).splitlines()] == text.splitlines()
    for split in ("partition", "rpartition"):
        assert [proved(piece) for piece in getattr(source(text), split)(by or "|")] == [
            *getattr(text, split)(by or "|")
        ]


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_changed_letters_keep_their_message(text):
    for change in ("lower", "upper", "title", "capitalize", "swapcase", "casefold"):
        result = getattr(source(text), change)()
        assert plain(result) == getattr(text, change)()
        assert not result or result._parts[0].source is not None


@settings(max_examples=100, deadline=None)
@given(text=TEXT, width=st.integers(0, 20))
def test_padded_texts_keep_their_message(text, width):
    for change, arguments in [("center", (width, "*")), ("ljust", (width,)), ("rjust", (width,)), ("zfill", (width,))]:
        result = getattr(source(text), change)(*arguments)
        assert plain(result) == getattr(text, change)(*arguments)
        assert result._parts[0].source is not None and result._parts[0].stop == len(text)
    assert plain(source(text).expandtabs(tabsize=width)) == text.expandtabs(tabsize=width)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    value=VALUES,
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii=st.booleans(),
    keys=st.booleans(),
    separators=st.sampled_from([None, (",", ":")]),
)
def test_json_is_what_the_library_writes(value, indent, ascii, keys, separators):
    settings = {"ensure_ascii": ascii, "indent": indent, "separators": separators, "sort_keys": keys}
    result = to_json(traced(value, 0, ("tool_calls",), [], True), **settings)
    assert plain(result) == json.dumps(value, **settings)
    assert plain_inside(result) == plain(result)


def test_a_complete_text_is_not_missing_however_it_is_written():
    conversation = trace([{"role": "user", "content": ' say "no"\n'}], None)
    (text,) = (message["content"] for message in conversation.messages)
    for result in (text, text.strip(), to_json(text), text.upper(), text.replace('"', "'"), "a" + text[:3] + text[3:]):
        assert not list(left_out(conversation.sources, pieces_of([result])))
    ((missed, ranges),) = left_out(conversation.sources, pieces_of([text[:4] + text.replace("no", "")[6:]]))
    assert missed.text == ' say "no"\n' and ranges[0][1] > ranges[0][0]


def test_texts_of_two_messages_are_not_mixed_in_one_operation():
    with pytest.raises(MixedTextsError):
        opaque("ab", (source("a", 0), source("b", 1)))
    assert concat((source("a", 0), source("b", 1))) == "ab"
    assert isinstance(TextSource(0, ("content",), "a", True).field, tuple)
