"""`--set path=value`: the rules of the file, on the command line."""

import pytest

from tests.cli.sections import config, only, problems


def test_overrides_follow_the_rules_of_the_file():
    run = config(
        "train: {steps: 3}\n",
        "train.steps=7",
        "train.optimizer.lr=1e-3",
        "train.optimizer.betas=[0.8, 0.9]",
        "model.dtype=float32",
        "techniques.lora.rank=4",
        "techniques.lora.targets=[q_proj]",
        "data.train=*.jsonl",
        'train.evaluate.prompts=["a, b", c]',
        "output=a=b",
    )
    assert (run.train.steps, run.train.optimizer.lr, run.train.optimizer.betas) == (7, 1e-3, (0.8, 0.9))
    assert (run.model.path, run.model.dtype) == ("gpt2", "float32")
    assert (run.techniques.lora.rank, run.techniques.lora.targets) == (4, ("q_proj",))
    assert (run.data.train, run.train.evaluate.prompts, run.output) == ("*.jsonl", ("a, b", "c"), "a=b")


def test_overrides_reach_into_lists():
    text = "techniques: {lora: [{name: a}, {name: b}]}\n"
    run = config(text, "techniques.lora.1.rank=2", "techniques.lora.2.name=c")
    assert [(a.name, a.rank) for a in run.techniques.lora] == [("a", 16), ("b", 2), ("c", 16)]
    assert "write a number, 0 to 2" in only(text, "techniques.lora.5.rank=2").remedy


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.stps=3", "did you mean steps?"),
        ("lr=3", "train.optimizer.lr"),
        ("train.steps", "not path=value"),
        ("=3", "not path=value"),
        ("train..steps=3", "not path=value"),
        ("train.steps=010", "write 10"),
        ("train.steps=[1", "not YAML"),
        ("seed.x=3", "seed is not"),
        ("output.x=3", "which has no keys"),
        ("train.steps=\x1b[31mred", "\\x1b[31mred"),
    ],
)
def test_a_wrong_override_is_placed_on_the_command_line(setting, says):
    reported = problems("seed: 0\n" if setting.startswith("seed") else "", setting)
    text = "\n".join(map(str, reported))
    assert "--set" in text
    assert says in text or "which has no keys" in text
    assert "\x1b" not in text
