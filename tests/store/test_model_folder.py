"""What identifies the weights of a folder."""

import torch

from tests.zoo import save
from treering.store.model_folder import fingerprint


def test_other_weights_of_the_same_shapes_have_another_fingerprint(tmp_path):
    one = save("llama", tmp_path / "one", seed=0)
    same = save("llama", tmp_path / "same", seed=0)
    other = save("llama", tmp_path / "other", seed=1)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_a_resumed_run_on_other_base_weights_is_refused(tmp_path):
    import pytest
    from transformers import LlamaForCausalLM

    import treering as tr
    from tests.toy_run import job
    from treering.train import train

    one = job(tmp_path, techniques=(tr.LoRA(rank=2),))
    train(one)
    torch.manual_seed(7)
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folder).config).save_pretrained(folder)
    with pytest.raises(tr.CheckpointError, match="another weights"):
        train(one)
