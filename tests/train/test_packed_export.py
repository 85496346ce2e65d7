"""`treering export --packed`: the quantized weights of a checkpoint as a folder, with the adapter next to them."""

import pytest
import torch

import treering as tr
from tests.toy_run import folder, job
from treering.core.errors import PlanError
from treering.train import train
from treering.train.export import export, reopen

IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("storage", ["packed", "fake"])
def test_a_checkpoint_gives_the_folder_that_was_trained(storage, tmp_path):
    folder(tmp_path / "model")
    quantize = tr.Quantize(format="int4", group=16, storage=storage)
    one = job(tmp_path, techniques=(quantize, tr.LoRA(rank=2)))
    train(one)
    with pytest.raises(PlanError, match="codes cannot hold their sum"):
        export(one, tmp_path / "merged", packed=True)
    export(one, tmp_path / "q", packed=True, adapter="default")
    again = tr.compose(tmp_path / "q", [tr.LoRA.from_peft(tmp_path / "q/adapter")])
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=IDS).logits, reopen(one).model(input_ids=IDS).logits)
    assert (tmp_path / "q/tokenizer.json").is_file()
