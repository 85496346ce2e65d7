"""Commands run in this process: what they print, and their exit codes."""

import json
import re
from pathlib import Path

import pytest

from treering.cli import entry
from treering.cli.config import recipes
from treering.cli.parsing import read_file, read_text, validate
from treering.cli.schema import RunConfig
from treering.core.errors import PlanError

SMALL = "model: gpt2\ndata: chat.jsonl\noutput: runs/x\n"


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(SMALL)
    return file


def run(*arguments: object) -> int:
    return entry.run([str(a) for a in arguments])


def test_a_valid_configuration_is_called_valid(small, capsys):
    assert run("config", "check", small) == 0
    assert capsys.readouterr().out == f"{small}: valid\n"


def test_an_invalid_one_ends_with_2_and_its_problems(small, capsys):
    small.write_text(SMALL + "train: {stps: 3}\n")
    assert run("config", "check", small, "--set", "seed=x") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "run.yaml:4: train.stps" in output.err
    assert "--set seed" in output.err
    assert "Traceback" not in output.err


def test_a_former_name_is_valid_with_a_notice_on_rank_0(small, capsys, caplog, monkeypatch):
    small.write_text(SMALL + "techniques: {osft: {soften: 0.1}}\n")
    assert run("config", "show", small) == 0
    shown = capsys.readouterr().out
    assert "damping: 0.1" in shown and "soften" not in shown
    assert [line.startswith(f"{small}:4: soften is now called damping") for line in caplog.messages] == [True]
    monkeypatch.setenv("RANK", "1")
    assert run("config", "check", small) == 0
    assert len(caplog.messages) == 1


def test_what_config_show_prints_is_a_configuration(small, capsys):
    assert run("config", "show", small, "--set", "output='a #\u202e\\n b'") == 0
    text = capsys.readouterr().out
    assert validate(RunConfig, read_text(text)) == validate(RunConfig, read_file(small), ["output='a #\u202e\\n b'"])


def test_the_schema_is_json(capsys):
    assert run("config", "schema") == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_a_wrong_word_is_2_and_suggests(capsys):
    assert run("trian") == 2
    assert "train" in capsys.readouterr().err


def test_an_error_of_ours_has_its_exit_code_and_no_traceback(small, capsys, monkeypatch):
    def refuse(*_):
        raise PlanError("lora and \x1b[31mosft both own the weight")

    monkeypatch.setattr("treering.cli.config.load", refuse)
    assert run("config", "check", small) == 3
    assert capsys.readouterr().err == "lora and \\x1b[31mosft both own the weight\n"
    assert run("config", "check", small, "--debug") == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_leaves_its_traceback_in_a_file(small, capsys, monkeypatch, tmp_path):
    def fall(*_):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("treering.cli.config.load", fall)
    assert run("config", "check", small) == entry.CRASHED
    output = capsys.readouterr().err
    assert "ZeroDivisionError: oh no" in output
    assert "Traceback (most" not in output
    (file,) = tmp_path.glob("treering-*.txt")
    assert str(file) in output
    assert "in fall" in file.read_text()


def test_an_unexpected_error_shows_its_traceback_where_no_file_can_be_written(small, capsys, monkeypatch, tmp_path):
    def fall(*_):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    monkeypatch.setattr("treering.cli.config.load", fall)
    assert run("config", "check", small) == entry.CRASHED
    output = capsys.readouterr().err
    assert "in fall" in output and "could not be written to a file" in output


def test_an_interrupt_is_130(small, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("treering.cli.config.load", interrupt)
    assert run("config", "check", small) == 130


def test_a_rank_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run("config", "check", "nowhere.yaml") == 2
    assert capsys.readouterr().err.startswith("[rank 3] ")


@pytest.mark.parametrize("name", [n for n in recipes() if n.endswith(".yaml")])
def test_a_recipe_is_valid_and_says_how_to_run_it(name):
    text = recipes()[name].read_text(encoding="utf-8")
    config = validate(RunConfig, read_text(text, name=name))
    assert config.techniques.chosen()
    assert all(f"# {word}" in text for word in ("Needs", "Run"))
    assert config.output == f"runs/{name.removesuffix('.yaml')}"


def test_the_slurm_script_runs_the_slurm_recipe():
    text = recipes()["slurm.sbatch"].read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    assert "srun" in text
    assert "treering train slurm.yaml" in text


def test_recipes_are_listed_and_copied_and_never_overwritten(tmp_path, capsys):
    assert run("recipes", "ls") == 0
    assert "lora-8gpu.yaml" in capsys.readouterr().out
    assert run("recipes", "cp", "lora-1gpu", tmp_path) == 0
    copied = tmp_path / "lora-1gpu.yaml"
    assert copied.read_text() == recipes()["lora-1gpu.yaml"].read_text(encoding="utf-8")
    assert run("recipes", "cp", "lora-1gpu", tmp_path) == 2
    assert "already there" in capsys.readouterr().err
    assert run("recipes", "cp", "lora-1gqu.yaml", tmp_path) == 2
    assert "did you mean lora-1gpu.yaml?" in capsys.readouterr().err
    assert run("recipes", "cp", "lora-1gpu", tmp_path / "no" / "where.yaml") == 2


def test_inspect_prints_a_folder(chat, capsys):
    assert run("inspect", chat.parent / "model") == 0
    text = capsys.readouterr().out
    assert "model: model" in text
    assert "llama" in text
    assert "there are no safetensors files" in text
    assert run("inspect", chat.parent / "nothing") == 5


def test_env_shows_no_variable_but_known_ones(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setenv("MY_PASSWORD", "swordfish")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run("env") == 0
    text = capsys.readouterr().out
    assert "aaaa" not in text
    assert "swordfish" not in text
    assert str(Path.home()) not in text
    assert "OMP_NUM_THREADS 7\n" in re.sub(" +", " ", text)


def test_data_show_marks_what_is_trained(chat, capsys):
    assert run("data", "show", chat, "-n", "1") == 0
    text = capsys.readouterr().out
    assert "── chat.jsonl:1 ·" in text
    assert "Hello [red]<|im_end|>" in text
    assert "⟦Hi \\x1b[2J there<|im_end|>" in text
    assert "\x1b" not in text


def test_data_check_reports_lengths_and_duplicates(chat, capsys):
    assert run("data", "check", chat) == 0
    text = capsys.readouterr().out
    assert "3 documents" in text
    assert "! 1 document repeats another exactly" in text
    assert "chat.jsonl:3 repeats chat.jsonl:2" in text


def test_data_build_fills_the_cache(chat, tmp_path, capsys):
    assert run("data", "build", chat, "--set", f"data.cache={tmp_path / 'cache'}") == 0
    assert "3 records as messages" in capsys.readouterr().out
    assert any((tmp_path / "cache").iterdir())


def test_data_commands_explain_what_is_missing(chat, capsys):
    assert run("data", "check", chat, "--which", "eval") == 2
    assert "data.eval" in capsys.readouterr().err
    assert run("data", "check", chat, "--set", f"model.path={chat.parent}") == 5
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 4, 1000])
def test_a_plan_needs_no_weights_and_no_partners(chat, capsys, ranks):
    import torch.distributed as dist

    assert run("plan", chat, "--ranks", ranks) == 0
    text = capsys.readouterr().out
    assert "full" in text
    assert "shard" in text
    assert not dist.is_initialized()


def test_a_plan_that_cannot_be_is_3(chat, capsys):
    assert run("plan", chat, "--ranks", 4, "--set", "mesh.replicate=3") == 3
    assert "does not divide 4 ranks" in capsys.readouterr().err


def test_train_refuses_a_second_launcher(small, capsys, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert run("train", small, "--nproc", 4) == 2
    assert "leave --nproc out" in capsys.readouterr().err


def test_train_in_a_batch_script_asks_for_srun(small, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert run("train", small) == 2
    assert "srun treering train" in capsys.readouterr().err


def test_a_configuration_becomes_a_job(small):
    from treering.cli.train import job_of

    config = validate(RunConfig, read_file(small), ["techniques.lora.rank=2", "mesh.replicate=2"])
    job = job_of(config)
    assert [type(t).__name__ for t in job.techniques] == ["LoRA"]
    assert job.mesh == {"replicate": 2, "shard": -1, "sequence": 1, "expert": 1}
    assert validate(RunConfig, read_text(job.written)) == config


def test_a_run_is_trained_exported_and_inspected(chat, capsys):
    few = [
        "model.initialise=true",
        "techniques={full: {}}",
        "train.steps=2",
        "train.tokens_per_step=64",
        "data.max_length=48",
    ]
    assert run("train", chat, *(part for setting in few for part in ("--set", setting))) == 0
    assert "step 2/2" in capsys.readouterr().out
    folder = chat.parent / "run"
    assert validate(RunConfig, read_file(folder / "config.yaml")) == validate(RunConfig, read_file(chat), few)
    assert run("inspect", folder) == 0
    assert "last step" in capsys.readouterr().out
    moved = folder.rename(chat.parent / "moved")
    assert run("export", moved, "--to", chat.parent / "out") == 0
    assert run("inspect", moved / "checkpoints" / "step-2") == 0
    assert run("inspect", chat.parent / "out") == 0
    assert "out: model" in capsys.readouterr().out
    assert run("export", moved, "--to", chat.parent / "out2", "--step", 1) == 5
