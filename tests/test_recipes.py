"""Every packaged recipe trains, with a tiny model and a few chats in the place of its own, on one rank or several."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.ranks import on_ranks
from tests.skips import sharded_codes
from tests.toy_run import chats, folder
from treering.cli import entry
from treering.cli.config import recipes
from treering.cli.parsing import read_file, validate
from treering.cli.schema import RunConfig
from treering.train.checkpoints.files import read

NAMES = [name for name in recipes() if name.endswith(".yaml")]
BFLOAT16 = ("moe-lora.yaml", "moe-nvfp4-qad.yaml")  # their tiles need it; on two ranks, with packed weights
RANKS = {
    "lora-8gpu.yaml": 2,
    "full-8gpu.yaml": 2,
    "osft-8gpu.yaml": 2,
    "moe-lora.yaml": 2,
    "moe-ep-8gpu.yaml": 2,
    "moe-nvfp4-qad.yaml": 2,
    "slurm.yaml": 4,
}  # slurm.yaml: two copies of two shards
SMALL = [
    "model.dtype=float32",
    "data.max_length=128",
    "data.eval_fraction=0.2",
    "train.steps=3",
    "train.tokens_per_step=512",
    "train.evaluate.every=2",
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A model wide enough for the recipes' ranks, and chats; made once."""
    root = tmp_path_factory.mktemp("toys")
    folder(root / "model", hidden_size=64, num_key_value_heads=4)
    mixture(root / "mixture")
    data = str(chats(root / "chat.jsonl"))
    measured = ["measure", str(root / "model"), "--data", data, "--max-length", "128", "--to", str(root / "known")]
    assert entry.run(measured) == 0
    return root


def mixture(path):
    """The toy folder with four experts in each block."""
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": 257, "bos_token_id": None}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    torch.manual_seed(0)
    hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **heads, **experts)).save_pretrained(folder(path))


def trained(file: Path, settings: list[str]) -> dict[str, Any]:
    from treering.cli.train import job_of
    from treering.train import train

    return train(job_of(validate(RunConfig, read_file(file), settings)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=sharded_codes) if name in BFLOAT16 else name for name in NAMES]
)
def test_a_recipe_trains_and_leaves_a_checkpoint(name, toys, tmp_path):
    assert entry.run(["recipes", "cp", name, str(tmp_path)]) == 0
    model = toys / ("mixture" if name == "moe-ep-8gpu.yaml" else "model")
    places = {"model.path": model, "data.train": toys / "chat.jsonl", "data.cache": toys / "tokens"}
    if "path: known" in (tmp_path / name).read_text(encoding="utf-8"):
        places["statistics.path"] = toys / "known"
    if "teacher:" in (tmp_path / name).read_text(encoding="utf-8"):
        places["objective.distill.teacher"] = toys / "model"
    small = [one for one in SMALL if name not in BFLOAT16 or "model.dtype" not in one]
    settings = [*small, *(f"{key}={value}" for key, value in places.items()), f"output={tmp_path / 'run'}"]
    ranks = RANKS.get(name, 1)

    summaries = on_ranks(ranks, trained, tmp_path / name, settings)

    assert summaries[0]["steps"] == 3 and summaries[0]["skipped"] == 0
    assert 0 < summaries[0]["loss"] < 1.1 * math.log(258)  # of 258 tokens, drawn at random
    saved = read(tmp_path / "run" / "checkpoints" / "step-3")
    assert any(key.endswith("exp_avg") for key in saved.tensors)
    assert len(list(saved.folder.glob("rank-*.safetensors"))) == ranks


def test_the_commands_of_the_influence_recipe_work_after_its_training(toys, tmp_path, monkeypatch, capsys):
    """As they stand in the file, in its folder; what follows a command there is a comment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text((toys / "chat.jsonl").read_text().splitlines()[0])
    assert entry.run(["recipes", "cp", "influence-1gpu", str(tmp_path)]) == 0
    text = (tmp_path / "influence-1gpu.yaml").read_text(encoding="utf-8")
    commands = [line.split() for line in re.findall(r"^# .*treering (train .*|influence .*)$", text, re.MULTILINE)]
    assert [" ".join(words[:2]) for words in commands[1:]] == [f"influence {w}" for w in ("build", "query", "clean")]
    places = {"model.path": toys / "model", "data.train": toys / "chat.jsonl", "data.cache": toys / "tokens"}
    settings = [*SMALL, *(f"{key}={value}" for key, value in places.items())]
    assert entry.run([*commands[0], *(part for one in settings for part in ("--set", one))]) == 0
    for words in commands[1:]:
        assert entry.run(words) == 0, words
    assert "train again: treering train runs/influence-1gpu/config.yaml" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "cleaned" / "cleaned.json").is_file()


@pytest.mark.parametrize("name", list(recipes()))
def test_a_copied_recipe_is_the_packaged_file(name, tmp_path, capsys):
    assert entry.run(["recipes", "cp", name, str(tmp_path)]) == 0
    assert (tmp_path / name).read_bytes() == recipes()[name].read_bytes()


@pytest.mark.parametrize("name", list(recipes()))
def test_the_commands_that_a_recipe_names_can_be_written_like_that(name):
    from typer.main import get_command

    from treering.cli.app import app

    text = recipes()[name].read_text(encoding="utf-8")
    named = re.findall(r"^# (?:\w+)?\s{2,}treering (.+?)(?:\s{2,}|$)|`treering (.+?)`", text, re.MULTILINE)
    for words in ((line or quoted).split() for line, quoted in named):
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # reads the arguments and calls nothing; a wrong one raises
