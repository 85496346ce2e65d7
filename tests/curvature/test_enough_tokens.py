"""How many tokens are measured by default."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from treering.anatomy import examine
from treering.curvature.counts import LEAST, enough_tokens


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2), LEAST),
        (LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=1), 4 * 14336),
        (
            Qwen3MoeConfig(
                hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=1, num_experts=128, num_experts_per_tok=8
            ),
            4 * 2048 * 128 // 8,
        ),
    ],
)
def test_the_default_gives_each_input_four_tokens(config, wanted):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert enough_tokens(examine(model), config) == wanted
