"""Tiny models of sixteen architectures, random but with no weight left at 0 or 1, so that losing one is seen.

from tests.zoo import ARCHITECTURES, build, save
model = build("gpt_oss", seed=1)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from treering.core.seeds import generator

VOCABULARY = 128
WINDOW = 8  # of every architecture with sliding attention: shorter than the sequences tests use


def _plain(kind: Callable[..., PretrainedConfig], **different: Any) -> Callable[[], PretrainedConfig]:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return lambda: kind(**(sizes | different))


def _gpt2() -> PretrainedConfig:
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return hf.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes, **no_dropout)


_ALTERNATING = ["sliding_attention", "full_attention"]
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 16}

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _plain(hf.LlamaConfig),
    "qwen2": _plain(hf.Qwen2Config),
    "qwen3": _plain(hf.Qwen3Config, head_dim=16),
    "qwen3_moe": _plain(
        hf.Qwen3MoeConfig,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "mistral": _plain(hf.MistralConfig, sliding_window=WINDOW),
    "mixtral": _plain(hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _plain(
        hf.Gemma2Config,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,  # low enough to matter for small random weights
        final_logit_softcapping=3.0,
    ),
    "gemma3": _plain(
        hf.Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=_ALTERNATING
    ),
    "phi3": _plain(hf.Phi3Config),
    "olmo2": _plain(hf.Olmo2Config),
    "granite": _plain(
        hf.GraniteConfig,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=4.0,
    ),
    "gpt2": _gpt2,
    "gpt_neox": _plain(hf.GPTNeoXConfig, num_key_value_heads=4),
    "deepseek_v3": _plain(
        hf.DeepseekV3Config,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
    ),
    "gpt_oss": _plain(
        hf.GptOssConfig,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        rope_parameters=_YARN,
    ),
    "glm4": _plain(hf.Glm4Config, head_dim=8),
}


def build(
    name: str,
    seed: int = 0,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    attention: str = "eager",
    experts: str = "eager",
) -> PreTrainedModel:
    """A model in eval mode whose weights are a function of (seed, parameter name). `tied=None`: as the family does."""
    config = ARCHITECTURES[name]()
    if tied is not None:
        config.tie_word_embeddings = tied
    model = hf.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation=experts, dtype=dtype
    )
    randomise(model, seed)
    return model.eval()


def save(name: str, folder: str | Path, **how: Any) -> Path:
    """Write `build(name, **how)` as a Hugging Face folder (config.json and safetensors) and return the folder."""
    build(name, **how).save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Matrices anew; 0.1 of noise on what is initialised to 0 or 1. Persistent buffers too: they are weights."""
    state = dict(model.named_parameters()) | {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in model.state_dict() and buffer.is_floating_point()
    }
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator(seed, name)).to(tensor.dtype)
        if tensor.ndim > 1:
            tensor.copy_(0.15 * noise)
        else:
            tensor.round_().add_(0.1 * noise)  # sinks are initialised with small noise of the global generator
