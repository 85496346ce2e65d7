"""Tiny mixtures of eight families: gated and not, concatenated and interleaved, transposed, biased, shared experts."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from tests.zoo import ARCHITECTURES, VOCABULARY, _plain, randomise

MORE: dict[str, Callable[[], Any]] = {
    "olmoe": _plain(hf.OlmoeConfig, num_experts=4, num_experts_per_tok=2, intermediate_size=24),
    "granitemoe": _plain(hf.GraniteMoeConfig, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24),
    "glm4_moe": _plain(
        hf.Glm4MoeConfig,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        layers_block_type=["attention", "moe", "attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
FAMILIES = MORE | {name: ARCHITECTURES[name] for name in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")}


def family(name: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = FAMILIES[name]()
    model = hf.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation=implementation, dtype=dtype
    )
    randomise(model, 0)
    return model.eval()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with stacked experts by name."""
    stacked = ("gate_up_proj", "up_proj")
    return {
        name: module
        for name, module in model.named_modules()
        if any(getattr(getattr(module, leaf, None), "ndim", 0) == 3 for leaf in stacked)
    }
