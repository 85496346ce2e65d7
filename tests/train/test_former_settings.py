"""Runs that were begun when settings of OSFT had other names are resumed, exported and inspected."""

import hashlib
import json
import shutil

import pytest

import treering as tr
from tests.same import assert_all_same
from tests.toy_run import job
from treering.cli.inspect import describe
from treering.cli.parsing import read_text, validate
from treering.cli.schema import RunConfig
from treering.train import train
from treering.train.checkpoints.files import read
from treering.train.export import export

TODAY = {"soften": "damping", "wire": "communication", "anchor": "keep_initial"}
OSFT = tr.OSFT(protect="weights", ratio=0.4, keep_initial=True, communication="cached", damping=0.02)


def as_an_earlier_version_wrote_it(checkpoint):
    """The manifest of `checkpoint` with the former names, and with the digest of that."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_bytes())["content"]
    for former, name in TODAY.items():
        assert content.count(f"{name}=") == 1
        content = content.replace(f"{name}=", f"{former}=")
    path.write_text(json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content}))


def tensors(folder):
    return {name: tensor.read() for name, tensor in read(folder / "checkpoints" / "step-8").tensors.items()}


def test_a_run_with_former_names_is_resumed_exported_and_inspected(tmp_path):
    settings = {"techniques": (OSFT,), "train": {"steps": 8}}
    train(job(tmp_path, "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-8")
    as_an_earlier_version_wrote_it(tmp_path / "cut" / "checkpoints" / "step-5")

    other = (tr.OSFT(protect="weights", ratio=0.4, keep_initial=True, communication="cached", damping=0.03),)
    with pytest.raises(tr.CheckpointError, match=r"another techniques: .*damping=0\.02.*damping=0\.03"):
        train(job(tmp_path, "cut", techniques=other, train={"steps": 8}))
    train(job(tmp_path, "cut", **settings))
    assert_all_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"), 0.0)

    as_an_earlier_version_wrote_it(tmp_path / "cut" / "checkpoints" / "step-8")
    assert export(job(tmp_path, "cut", **settings), tmp_path / "exported").is_dir()
    assert "damping=0.02" in describe(tmp_path / "cut" / "checkpoints" / "step-8").facts["techniques"]


def test_the_configuration_of_such_a_run_is_read():
    text = "model: m\ndata: d\noutput: o\ntechniques:\n  osft:\n    soften: 0.02\n    wire: cached\n    anchor: true\n"
    notices: list[str] = []
    config = validate(RunConfig, read_text(text, name="run.yaml"), notice=notices.append)
    assert config.techniques.osft == tr.OSFT(damping=0.02, communication="cached", keep_initial=True)
    assert [line.split(";")[0] for line in notices] == [
        f"run.yaml:{6 + i}: {former} is now called {name}" for i, (former, name) in enumerate(TODAY.items())
    ]


@pytest.mark.parametrize("former", TODAY)
def test_the_constructor_names_the_setting_of_today(former):
    with pytest.raises(tr.ConfigError, match=f"{former} is now called {TODAY[former]}"):
        tr.OSFT(**{former: 1})
