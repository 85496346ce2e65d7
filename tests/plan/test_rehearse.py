"""An export tried out before the first step: what would fail at the end is refused at the beginning."""

import pytest
import torch
from safetensors.torch import load_file

import treering as tr
from tests.zoo import save
from treering.plan.rehearse import rehearse
from treering.store import publish


def test_an_export_is_rehearsed_without_leaving_a_trace(tmp_path):
    for arch in ("qwen3_moe", "phi3", "gpt2"):
        run = tr.compose(save(arch, tmp_path / arch), [tr.LoRA(rank=2)])
        rehearse(run.plan, tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists()


def test_older_names_in_the_source_are_no_reason_to_refuse(tmp_path):
    from safetensors.torch import save_file

    folder = save("gpt2", tmp_path / "m")
    older = {
        name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    rehearse(tr.compose(folder, [tr.Full()]).plan, tmp_path / "out")


def test_a_rehearsal_finds_what_would_fail_at_the_end(tmp_path, monkeypatch):
    from treering.plan import rehearse as module

    run = tr.compose(save("qwen3_moe", tmp_path / "m"), [tr.Full()])
    with monkeypatch.context() as patch:
        patch.setattr(publish, "free", lambda path: 0)
        with pytest.raises(tr.CheckpointError, match="0 MiB are free"):
            rehearse(run.plan, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(tr.CheckpointError, match="is a file"):
        rehearse(run.plan, tmp_path / "file" / "out")
    translate = module.to_file_layout
    with monkeypatch.context() as patch:
        patch.setattr(module, "to_file_layout", lambda *a: {n: v[:1] for n, v in translate(*a).items()})
        with pytest.raises(tr.CheckpointError, match="would be exported as"):
            rehearse(run.plan, tmp_path / "out")
    layout = module.layout
    with monkeypatch.context() as patch:
        patch.setattr(module, "layout", lambda plan: {n: v for n, v in layout(plan).items() if "experts.1" not in n})
        with pytest.raises(tr.CheckpointError, match="no export of it would be read as that"):
            rehearse(run.plan, tmp_path / "out")
    with torch.no_grad():
        run.model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = torch.nan
    with pytest.raises(tr.CheckpointError, match="not finite"):
        rehearse(run.plan, tmp_path / "out")


def test_an_adapter_alone_needs_space_for_itself_only(tmp_path, monkeypatch):
    folder = save("llama", tmp_path / "m")
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(publish, "free", lambda path: size // 2 + publish.SPARE)
    rehearse(tr.compose(folder, [tr.LoRA(rank=1)]).plan, tmp_path / "out")
    with pytest.raises(tr.CheckpointError, match="are free"):
        rehearse(tr.compose(folder, [tr.LoRA(rank=2, init="pissa", targets=("q_proj",))]).plan, tmp_path / "out")
