"""Model folders made to do harm: refused by name, in bounded time and memory, and nothing of them runs."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy_run
from tests.ranks import PATIENCE
from treering.core.errors import CheckpointError, TreeringError
from treering.plan import compose
from treering.plan import open_model as opening
from treering.store.untrusted import check_folder, notes_on, open_tokenizer


@pytest.fixture
def model(tmp_path):
    return toy_run.folder(tmp_path / "model")


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, *words: str, call=opening.read_config):
    with pytest.raises(CheckpointError) as caught:
        call(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


class Poison:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


PICKLED = ("pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "vocab.pkl", ".metadata", "rng_state.pth", "a.distcp")


def poison(folder: Path, marker: Path) -> None:
    for name in PICKLED:
        (folder / name).write_bytes(pickle.dumps(Poison(marker)))


def test_the_poison_works(tmp_path):
    poison(tmp_path, tmp_path / "marker")
    pickle.loads((tmp_path / "vocab.pkl").read_bytes())
    assert (tmp_path / "marker").is_dir()


# An audit hook sees every unpickled global and every connection of the process, whoever asks for it.
GUARDED = """
import sys
seen = []
def watch(event, given):
    if event == "pickle.find_class" and given[0] in ("posix", "os", "builtins"):
        seen.append(f"unpickled {given}")
    if event == "socket.getaddrinfo" and given[0] not in (None, "localhost", "127.0.0.1", "::1"):
        seen.append(f"looked up {given}")
        raise OSError("no network here")
    if event == "socket.connect" and isinstance(given[1], tuple) and given[1][0] not in ("127.0.0.1", "::1"):
        seen.append(f"connected to {given[1]}")
        raise OSError("no network here")
sys.addaudithook(watch)
import torch
torch.set_num_threads(1)
from treering.cli import entry
for line in sys.stdin.read().splitlines():
    code = entry.run(line.split())
    print("CODE", code, line, flush=True)
print("SEEN", seen)
"""
SECRET = "hf_" + "Qz9" * 9


def guarded(*commands: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    keys = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET[3:], "MY_PASSWORD": SECRET[3:], "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", GUARDED],
        input="\n".join(commands),
        env=environment | keys,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_every_command_runs_beside_poison_without_network_and_keeps_secrets(tmp_path, model):
    marker, run = tmp_path / "marker", tmp_path / "run"
    poison(model, marker)
    change(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (model / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    run.mkdir()
    poison(run, marker)
    chats = toy_run.chats(tmp_path / "chat.jsonl", 8)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {model}, dtype: float32}}\ntechniques: {{full: }}\noutput: {run}\n"
        f"data: {{train: {chats}, cache: {tmp_path}/tokens, max_length: 64}}\n"
        "train: {steps: 1, tokens_per_step: 64}\n"
    )
    commands = [f"config check {file}", f"config show {file}", "config schema", "recipes ls", "env"]
    commands += [f"data {name} {file}" for name in ("show", "check", "build")] + [f"plan {file}", f"train {file}"]
    commands += [f"export {run} --to {tmp_path}/out", f"doctor --no-ranks --output {run}"]
    commands += [f"inspect {folder}" for folder in (model, run, run / "checkpoints" / "step-1", tmp_path / "out")]
    done = guarded(*commands)
    codes = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert codes == [f"CODE 0 {command}" for command in commands], done.stdout[-2000:] + done.stderr[-2000:]
    assert "SEEN []" in done.stdout, done.stdout[-500:]
    assert not marker.exists()
    assert "auto_map" in done.stdout and "may be pickle and is never read" in done.stdout
    texts = [done.stdout, done.stderr, *(p.read_text("latin-1") for p in run.rglob("*") if p.is_file())]
    assert not [text for text in texts if SECRET in text or SECRET[3:] in text]
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".py", ".pkl")]


def test_secrets_are_masked_in_messages_tracebacks_and_their_file(tmp_path, monkeypatch, capsys):
    from treering.cli import entry

    monkeypatch.setenv("HF_TOKEN", "a-token-without-a-known-look")
    monkeypatch.setattr(entry.tempfile, "tempdir", str(tmp_path))
    texts = ["at https://me:pw@host/x and hf_" + "a" * 30, "a-token-without-a-known-look \x1b[2J [red]"]
    for text in texts:
        entry._explain(TreeringError(text), True)
        entry._report(RuntimeError(text), True)
    said = capsys.readouterr().err + "".join(p.read_text() for p in tmp_path.glob("treering-*.txt"))
    assert len(list(tmp_path.glob("treering-*.txt"))) == 2
    for secret in ("me:pw", "hf_aaa", "without-a-known", "\x1b"):
        assert secret not in said
    assert "https://***@host/x" in said and "[red]" in said


def test_code_in_a_folder_is_refused_where_transformers_has_none_of_its_own(model):
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    refused(model, "config.json", "auto_map", "'evil'")


def test_code_beside_a_native_model_is_left_alone_and_said_so(model):
    change(model / "config.json", auto_map={"AutoConfig": "evil.Config"})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]})
    assert opening.read_config(model).model_type == "llama"
    assert open_tokenizer(model).eos_token == "<|im_end|>"
    assert len(notes_on(model)) == 2


def test_a_tokenizer_that_is_code_is_refused(model):
    (model / "tokenizer.json").unlink()
    change(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Slow", None]})
    refused(model, "tokenizer_config.json", "auto_map", call=open_tokenizer)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"attn_implementation": "someone/kernel"}, "fetch and run"),
        ({"_attn_implementation": "someone/kernel@main:f"}, "fetch and run"),
        ({"text_config": {"attn_implementation": {"": "someone/kernel"}}}, "fetch and run"),
        ({"num_hidden_layers": 10**9}, "more than 4,096"),
        ({"num_local_experts": 1e30}, "more than 65,536"),
        ({"dtype": "load"}, "config.json"),
        ({"model_type": ["x"]}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": -4}, "config.json"),
        ({"rope_parameters": 5}, "config.json"),
    ],
)
def test_a_config_that_does_harm_is_refused(model, settings, word):
    change(model / "config.json", **settings)
    refused(model, "config.json", word, call=lambda folder: opening.on_meta(folder, "auto"))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, '{"a":' * 90 + "1" + "}" * 90, "{" + " " * (9 << 20) + "}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_json_that_is_no_settings_is_refused(model, name, text):
    (model / name).write_text(text)
    refused(model, name)
    refused(model, name, call=open_tokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "vocab.json"])
def test_a_damaged_tokenizer_is_one_named_error(model, name):
    (model / name).write_text("{" if name == "special_tokens_map.json" else '{"model": 3, "added_tokens": "x"}')
    try:
        open_tokenizer(model)
    except CheckpointError as error:
        assert str(model) in str(error)
    else:
        assert name == "vocab.json"  # which nothing reads beside a tokenizer.json


@pytest.mark.parametrize("settings", [{"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, {"init_inputs": ["/x"]}])
def test_a_tokenizer_cannot_name_files_elsewhere(model, settings):
    change(model / "tokenizer_config.json", **settings)
    refused(model, "tokenizer_config.json", next(iter(settings)), call=open_tokenizer)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_is_not_waited_for_and_a_link_not_followed(tmp_path, model, name):
    other = tmp_path / "elsewhere"
    (model / name).rename(other) if (model / name).exists() else other.write_text("x")
    (model / name).symlink_to(other)
    refused(model, name, "leads out of its folder", call=check_folder)
    (model / name).unlink()
    os.mkfifo(model / name)
    refused(model, name, "a pipe", call=check_folder)
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    refused(model, name, "a device", call=check_folder)
    (model / name).unlink()
    (model / name).symlink_to(name)
    refused(model, name, call=check_folder)


def test_a_folder_of_extra_templates_is_looked_into(model, tmp_path):
    (model / "additional_chat_templates").symlink_to(tmp_path)
    refused(model, "additional_chat_templates", "is a link", call=check_folder)


def test_the_hub_s_own_cache_is_read(tmp_path, model):
    blobs, snapshot = tmp_path / "models--o--m" / "blobs", tmp_path / "models--o--m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert compose(snapshot, [toy_run.tr.Full()], dtype="float32") is not None
    assert open_tokenizer(snapshot).is_fast
