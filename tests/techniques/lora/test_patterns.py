"""Patterns: a rank, alpha, dtype or start of their own for the weights that they name."""

import pytest
import torch

import treering as tr
from tests.experts.families import family
from tests.same import assert_same
from tests.techniques.lora.test_experts import IDS, logits
from tests.techniques.lora.test_math import randomised
from tests.zoo import build
from treering.core.errors import CheckpointError, ConfigError, PlanError

SETTINGS = {
    "targets": ("q_proj", "o_proj", "*.experts.*"),
    "rank": 3,
    "alpha": 6.0,
    "patterns": {
        "*.experts.*": {"rank": 2},
        "*.layers.1.*": {"rank": 4, "alpha": 2.0},
        "*.layers.1.mlp.experts.down_proj": {"rank": 5, "dtype": "bf16"},
        "*.layers.0.*.o_proj": {"rank": 0},
    },
}
WANTED = {  # (rank, scale, dtype)
    "layers.0.self_attn.q_proj.lora_default": (3, 2.0, torch.float32),
    "layers.0.mlp.experts.lora_default_gate_up_proj": (2, 3.0, torch.float32),
    "layers.0.mlp.experts.lora_default_down_proj": (2, 3.0, torch.float32),
    "layers.1.self_attn.q_proj.lora_default": (4, 0.5, torch.float32),
    "layers.1.self_attn.o_proj.lora_default": (4, 0.5, torch.float32),
    "layers.1.mlp.experts.lora_default_gate_up_proj": (4, 0.5, torch.float32),
    "layers.1.mlp.experts.lora_default_down_proj": (5, 0.4, torch.bfloat16),
}


def test_later_patterns_override_earlier_ones_field_by_field():
    run = tr.compose(family("qwen3_moe"), [tr.LoRA(**SETTINGS)])
    found = {
        name.removeprefix("model."): (module.A.shape[-2], module.scale, module.A.dtype)
        for name, module in run.model.named_modules()
        if name.rpartition(".")[2].startswith("lora_")
    }
    assert found == WANTED
    assert "ranks 2 to 5, scale 0.4 or 0.5 or 2 or 3" in run.explain()


def test_peft_opens_them_and_we_open_what_peft_wrote(tmp_path):
    from peft import PeftModel

    settings = SETTINGS | {"patterns": {key: {k: v for k, v in p.items() if k != "dtype"}
                                        for key, p in SETTINGS["patterns"].items()}}  # fmt: skip
    run = randomised(tr.compose(family("qwen3_moe"), [tr.LoRA(**settings)]))
    run.export(tmp_path / "ours", adapter="default")
    opened = PeftModel.from_pretrained(family("qwen3_moe"), tmp_path / "ours")
    with torch.no_grad():
        assert_same(opened.eval()(IDS, use_cache=False).logits, logits(run.model), 1e-5)
    opened.save_pretrained(tmp_path / "theirs")
    again = tr.compose(family("qwen3_moe"), [tr.LoRA.from_peft(tmp_path / "theirs")])
    assert torch.equal(logits(again.model), logits(run.model))


def test_a_regular_expression_in_a_file_is_not_evaluated(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*q_proj": 2})
    get_peft_model(build("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="write the modules' names in its place"):
        tr.LoRA.from_peft(tmp_path / "a")


def test_wrong_patterns_are_refused_by_name():
    with pytest.raises(ConfigError, match="'q_proj' has 'ranks'; a pattern has rank, alpha, dtype, init"):
        tr.LoRA(patterns={"q_proj": {"ranks": 3}})
    with pytest.raises(ConfigError, match="rank is -1"):
        tr.LoRA(patterns={"q_proj": {"rank": -1}})
    with pytest.raises(ConfigError, match="no pattern can have another init"):
        tr.LoRA(init="file", file="x", patterns={"q_proj": {"init": "pissa"}})
    with pytest.raises(PlanError, match=r"'w_proj' of lora.patterns matches no target"):
        tr.compose(build("llama"), [tr.LoRA(patterns={"w_proj": {"rank": 3}})])


def test_settings_without_patterns_are_written_as_they_were_before_there_were_any():
    assert "patterns" not in repr(tr.LoRA()) and "allocate" not in repr(tr.LoRA())
    assert "patterns={'q_proj': LoRAPattern(rank=4" in repr(tr.LoRA(patterns={"q_proj": {"rank": 4}}))
