"""Values to a checked configuration: every problem at once, each with place, given, allowed and a remedy."""

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli.sections import SMALL, Inner, Outer, config, only, problems
from treering.cli.parsing import ConfigDocument, ConfigErrors, json_schema, read_text, validate
from treering.cli.parsing.problems import dotted
from treering.cli.parsing.sections import describe, paths
from treering.cli.parsing.suggest import OTHER_TRAINERS
from treering.cli.schema import RunConfig, Techniques
from treering.techniques import TECHNIQUES
from treering.techniques.shard import Shard


def test_the_smallest_file_is_a_run_with_defaults():
    run = config("")
    assert (run.model.path, run.data.train, run.output, run.seed) == ("gpt2", "chat.jsonl", "runs/x", 0)
    assert run.techniques == Techniques()
    assert run.techniques.chosen() == ()


def test_a_technique_with_nothing_behind_it_has_its_defaults():
    assert config("techniques:\n  shard:\n").techniques.shard == Shard()
    assert config("techniques: {shard: {}}\n").techniques.shard == Shard()
    assert config("techniques:\n").techniques == Techniques()
    assert config("", "techniques.shard=null").techniques.chosen() == (Shard(),)


def test_one_adapter_or_several():
    one = config("techniques: {lora: {rank: 4}}\n").techniques
    several = config("techniques: {lora: [{name: a}, {name: b, targets: [q_proj]}]}\n").techniques
    assert one.lora.rank == 4
    assert [adapter.name for adapter in several.chosen()] == ["a", "b"]


def test_two_adapters_of_one_name_are_refused():
    problem = only("techniques: {lora: [{name: a}, {name: a}]}\n")
    assert problem.path == ("techniques", "lora", 1, "name")
    assert "two adapters" in problem.message


def test_whole_numbers_are_numbers():
    assert config("train: {optimizer: {lr: 1}}\n").train.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("text", "path", "allowed", "remedy"),
    [
        ('train: {optimizer: {lr: "1e-4"}}', "train.optimizer.lr", "a number", "write 1e-4, without quotes"),
        ("train: {steps: 1_000}", "train.steps", "a whole number or null", "write 1000"),
        ("train: {steps: 1e3}", "train.steps", "a whole number or null", "write 1000"),
        ("train: {steps: true}", "train.steps", "a whole number or null", ""),
        ("train: {log_every: null}", "train.log_every", "a whole number", "leave the key out to get the default"),
        ("data: {train: x, shuffle: no}", "data.shuffle", "true or false", "write false, without quotes"),
        ("data: {train: x, shuffle: 1}", "data.shuffle", "true or false", "write true"),
        ("data: {train: x, template: 3}", "data.template", "text or null", 'put it into quotes: "3"'),
        ("data: {train: x, ignore: id}", "data.ignore", "a list of texts", "write it as a list: [id]"),
        ("data: {train: x, columns: {text: 1}}", "data.columns.text", "text", 'put it into quotes: "1"'),
        ("train: {optimizer: {name: adam}}", "train.optimizer.name", "adamw, sgd or muon", "did you mean adamw?"),
        ("train: {optimizer: {betas: [0.9]}}", "train.optimizer.betas", "a list [a number, a number]", ""),
        ("train: {optimizer: {betas: [0.9, 0.9, 0.9]}}", "train.optimizer.betas", "a list [a number, a number]", ""),
        (
            "techniques: {shard: 3}",
            "techniques.shard",
            "a section (compute, reduce, reshard, offload, hold) or null",
            "compute",
        ),
        (
            "techniques: {lora: {targets: q_proj}}",
            "techniques.lora.targets",
            "a list of texts or all-linear",
            "[q_proj]",
        ),
        ("techniques: {lora: [{rank: x}]}", "techniques.lora[0].rank", "a whole number", ""),
        ("train: [1]", "train", "a section (steps, ", ""),
        ("train: {prompts: 1}", "train.prompts", "steps, epochs", "train.evaluate.prompts"),
    ],
)
def test_a_wrong_value_is_placed_and_explained(text, path, allowed, remedy):
    start = SMALL.replace("data: chat.jsonl\n", "") if text.startswith("data") else SMALL
    (problem,) = problems(text, start=start)
    assert dotted(problem.path) == path
    assert problem.where == f"run.yaml:{len(start.splitlines()) + 1}"
    assert allowed in problem.allowed
    assert remedy in problem.remedy
    assert str(problem).startswith(f"{problem.where}: {path}\n")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("sed: 1", "did you mean seed?"),
        ("lr: 1e-4", "write train.optimizer.lr"),
        ("learning_rate: 1e-4", "train.optimizer.lr"),
        ("train: {learning-rate: 1}", "train.optimizer.lr"),
        ("train: {weight_decay: 0.1}", "train.optimizer.weight_decay"),
        ("train: {stpes: 1}", "did you mean steps?"),
        ("train: {logEvery: 1}", "did you mean log_every?"),
        ("train.steps: 3", "write it nested: train: {steps: …}"),
        ("lora: {rank: 3}", "techniques.lora"),
        ("techniques: {Lora: {}}", "did you mean lora?"),
        ("techniques: {lora: {rnak: 3}}", "did you mean rank?"),
        ("zzzzzz: 1", ""),
    ],
)
def test_an_unknown_key_is_traced_to_what_was_meant(text, remedy):
    problem = only(text)
    assert "is not a setting" in problem.message
    assert remedy in problem.remedy
    assert problem.remedy or not remedy


def test_words_of_other_trainers_lead_to_settings_that_exist():
    known = set(paths(RunConfig))
    for word, target in OTHER_TRAINERS.items():
        assert tuple(target.split(".")) in known, f"{word} → {target}"


def test_everything_is_said_at_once_in_the_order_of_the_file():
    reported = problems(
        "train:\n  log_every: 2\n  stps: 1\n  optimizer: {lr: -1, momentun: 0}\nseed: 3\nmesh: {shard: 0}\n",
        "data.max_length=1",
    )
    assert [(p.where, p.path[-1]) for p in reported] == [
        ("run.yaml:6", "stps"),
        ("run.yaml:7", "lr"),
        ("run.yaml:7", "momentun"),
        ("run.yaml:9", "shard"),
        ("--set data.max_length", "max_length"),
    ]


def test_a_config_error_of_a_section_with_an_unknown_key_is_not_hidden():
    reported = problems("train:\n  epochs: -1\n  stps: 1\n")
    assert [p.path for p in reported] == [("train", "epochs"), ("train", "stps")]
    assert "must be greater than 0" in reported[0].message


def test_what_is_missing_is_named():
    reported = problems("seed: 1", start="")
    assert [p.path for p in reported] == [("model",), ("data",), ("output",)]
    assert all(p.where == "run.yaml" and "missing" in p.message for p in reported)
    (problem,) = problems("model: {dtype: auto}", start="data: x\noutput: y\n")
    assert (problem.path, problem.where) == (("model", "path"), "run.yaml:3")


def test_a_message_cannot_be_used_to_paint_the_terminal():
    text = "\n".join(map(str, problems('train: {steps: "\\e[2J\\u202etxt", "\\e[1mbad": 1}\n')))
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_secret_in_the_wrong_place_is_not_repeated():
    text = "\n".join(map(str, problems("api_key: abcdefghijkl\ntrain: {steps: hf_abcdefghijklmnopqrstuvwxyz}\n")))
    assert "abcdefghijkl" not in text
    assert "***" in text


def test_many_problems_are_cut_but_counted():
    with pytest.raises(ConfigErrors, match="and 30 more"):
        config("".join(f"zz{i}: 1\n" for i in range(50)))


def read(text: str) -> Outer:
    return validate(Outer, read_text(text))


def test_null_turns_off_what_is_on_by_default_and_on_what_is_off():
    assert read("on:\noff:\n") == Outer(on=None, off=Inner())


def test_errors_inside_lists_and_mappings_are_located():
    reported = problems("many: [{}, {size: -1}]\nnamed: {a: {size: x}}\nnames: {b: [1, y]}\n", cls=Outer, start="")
    assert [p.path for p in reported] == [("many", 1, "size"), ("named", "a", "size"), ("names", "b", 1)]


def test_a_union_of_scalars_is_one_problem():
    (problem,) = problems("number: high\n", cls=Outer, start="")
    assert problem.allowed == "a number or auto"


def test_types_are_described_in_words():
    assert describe(Mapping[str, float]) == "a mapping from names to numbers"
    assert describe(str | tuple[str, ...] | None) == "text, a list of texts or null"


def test_the_json_schema_has_the_same_rules():
    schema = json_schema(RunConfig)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "data", "output"}
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    techniques = schema["$defs"]["Techniques"]
    assert techniques["additionalProperties"] is False
    assert set(techniques["properties"]) == set(TECHNIQUES)
    assert schema["$defs"]["Optimizer"]["properties"]["name"]["default"] == "adamw"
    assert schema["$defs"]["Optimizer"]["properties"]["lr"]["default"] == 1e-5


keys = st.sampled_from(
    ["model", "data", "train", "techniques", "lora", "shard", "optimizer", "lr", "steps", "output", "seed", "x"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=15,
)


@settings(max_examples=150)
@given(st.dictionaries(keys, anything, max_size=6))
def test_any_tree_of_values_is_a_configuration_or_its_problems(values):
    try:
        assert isinstance(validate(RunConfig, ConfigDocument(name="run.yaml", values=values)), RunConfig)
    except ConfigErrors as error:
        assert all(p.message for p in error.problems)
