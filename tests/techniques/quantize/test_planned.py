"""Memory of a quantized run is planned from shapes, in every number format."""

import pytest

from tests.toy_run import folder
from tests.weights.folders import WRITERS, published
from treering.cli import entry
from treering.formats import NAMED


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("storage", ["packed", "fake"])
def test_every_format_is_planned(storage, name, tmp_path, capsys):
    folder(tmp_path / "model", hidden_size=128, intermediate_size=256)
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}/model\ndata: {{train: x.jsonl, max_length: 64}}\noutput: {tmp_path}/run\n"
        f"techniques: {{quantize: {{format: {name}, storage: {storage}}}, lora: {{rank: 2}}}}\n"
    )
    assert entry.run(["plan", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "64 tokens need" in shown and f"{'weights in' if storage == 'packed' else 'multiply as'} {name}" in shown


def test_a_model_that_is_initialised_has_no_weights_of_its_folder(tmp_path, capsys):
    quantized = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    text = f"model: {{path: {quantized}, initialise: INIT}}\ndata: {{train: x.jsonl, max_length: 64}}\n"
    text += f"output: {tmp_path}/r\n"
    shown = []
    for initialise in ("false", "true"):
        techniques = "{lora: {rank: 2}}" if initialise == "false" else "{full: }"
        (tmp_path / "run.yaml").write_text(text.replace("INIT", initialise) + f"techniques: {techniques}\n")
        assert entry.run(["plan", str(tmp_path / "run.yaml")]) == 0
        shown.append(capsys.readouterr().out)
    assert "as the folder stores them" in shown[0] and "stores" not in shown[1] and "64 tokens need" in shown[1]
