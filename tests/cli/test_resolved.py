"""A configuration written out with every default reads back as itself, and holds no secret."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli.sections import Inner, Outer, config
from treering.cli.parsing import ConfigErrors, read_text, to_yaml, validate
from treering.cli.schema import RunConfig

words = st.text(max_size=30) | st.sampled_from(
    ["1e-4", "no", "010", "null", "~", "", ".nan", "0x1", "- a", "a: b", "#", "***", "<<"]
)
finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, size=st.integers(0, 2**62))
outers = st.builds(
    Outer,
    number=finite | st.just("auto"),
    pair=st.tuples(st.integers(-(2**63), 2**63 - 1), finite),
    names=st.dictionaries(words.filter(bool), st.lists(st.integers(0, 9)).map(tuple), max_size=2),
    on=st.none() | inners,
    off=st.none() | inners,
    many=st.lists(inners, max_size=2).map(tuple),
    named=st.dictionaries(words.filter(bool), inners, max_size=2),
    mixed=st.none() | words | st.lists(words, max_size=2).map(tuple),
    flag=st.booleans(),
    text=words,
)


@settings(max_examples=100)
@given(outers)
def test_what_is_written_reads_back_as_the_same_configuration(value):
    try:
        again = validate(Outer, read_text(to_yaml(value)))
    except ConfigErrors as error:
        assert any(word in str(error) for word in ("NUL", "merge keys"))
        return
    assert again == value
    assert to_yaml(again) == to_yaml(value)


def test_a_resolved_run_reads_back_and_has_every_default():
    run = config("techniques: {lora: [{name: a}], shard: }\ntrain: {optimizer: {lr: 3e-4}}\n")
    text = to_yaml(run)
    assert validate(RunConfig, read_text(text)) == run
    assert "max_length: 4096" in text
    assert "full" not in text


def test_a_resolved_run_holds_no_secret():
    @dataclass(frozen=True, kw_only=True)
    class Hub:
        token: str
        hub_token: str
        eos_token: str
        url: str
        note: str

    hub = Hub(
        token="abcdef",
        hub_token="abcdef",
        eos_token="</s>",
        url="https://me:pw@host/x",
        note="use hf_abcdefghijklmnopqrst",
    )
    text = to_yaml(hub)
    assert "abcdef" not in text
    assert "me:pw" not in text
    assert "</s>" in text
