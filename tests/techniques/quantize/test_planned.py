"""Memory of a quantized run is planned from shapes, in every number format."""

import pytest

from tests.toy_run import folder
from treering.cli import entry
from treering.formats import NAMED


@pytest.mark.parametrize("name", NAMED)
def test_every_format_is_planned(name, tmp_path, capsys):
    folder(tmp_path / "model", hidden_size=128, intermediate_size=256)
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}/model\ndata: {{train: x.jsonl, max_length: 64}}\noutput: {tmp_path}/run\n"
        f"techniques: {{quantize: {{format: {name}}}, lora: {{rank: 2}}}}\n"
    )
    assert entry.run(["plan", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "64 tokens need" in shown and f"weights in {name}" in shown
