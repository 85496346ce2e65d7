"""A tiny config of any model type: the fields of its default config, shrunk by what their names say."""

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo import randomise

LAYERS = 4
MOST = 2_000_000  # parameters of a model that is run; settings nested in a config are not shrunk
_RULES: tuple[tuple[str, int], ...] = (
    (r"^(num_hidden_layers|num_layers|n_layers?)$", LAYERS),
    (r"^vocab_size$", 128),
    (r"(_per_tok|_topk|^moe_k|^top_?k)$", 2),
    (r"(^|_)(n|num)(_\w+)?_experts$", 4),
    (r"^(n_group|topk_group|n_shared_experts)$", 1),
    (r"(key_value_heads|kv_heads|n_kv_heads)$", 2),
    (r"^(num_attention_heads|n_heads?|num_heads)$", 4),
    (r"head_dim|head_size", 8),
    (r"^(sliding_window|window_size)$", 8),
    (r"_rank$", 16),
    (r"^(hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim)$", 32),
    (r"intermediate_size|ffn_dim|n_inner|ffn_hidden_size|d_inner", 48),
    (r"max_position|n_positions|max_seq_len|n_ctx", 512),
)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config, shrunk; a field whose name says nothing keeps its value."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    layers = getattr(default, "num_hidden_layers", 0)
    changed: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name.endswith("token_id"):
            changed[name] = 1 if isinstance(value, int) and name != "pad_token_id" else None
        elif isinstance(value, list) and layers > LAYERS and len(value) == layers:
            changed[name] = [*value[: LAYERS - 1], value[-1]]
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small = next((size for rule, size in _RULES if re.search(rule, name)), value)
            changed[name] = min(small, value)
    if changed.get("num_key_value_heads") and default.num_key_value_heads == default.num_attention_heads:
        changed["num_key_value_heads"] = changed.get("num_attention_heads", default.num_attention_heads)
    return kind(**changed)


class Unbuildable(Exception):
    """transformers cannot make a model of this type from its own default config."""


def tiny(model_type: str) -> PreTrainedModel:
    """On the CPU, with weights, if the shrunk config makes a model that runs; else the default one on meta."""
    try:
        config = tiny_config(model_type)
        if sum(p.numel() for p in _on_meta(config).parameters()) < MOST:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
            )
            randomise(model, seed=0)
            model.eval()(torch.ones(1, 4, dtype=torch.int64), use_cache=False)
            return model
    except Exception:  # noqa: BLE001, S110: whatever a stranger's code raises about sizes it does not like
        pass
    try:
        return _on_meta(CONFIG_MAPPING[model_type]())
    except Exception as error:
        raise Unbuildable(model_type) from error


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
