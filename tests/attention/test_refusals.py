from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from tests.attention.packs import LENGTHS, packed, tokens
from tests.zoo import ARCHITECTURES, build
from treering.attention import Documents, install, packable
from treering.attention.hook import DeferredMask, deferred_mask, rope_conflict
from treering.attention.install import _receivers
from treering.core.errors import DataError, PlanError

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
UNPACKABLE = [
    (hf.MambaConfig(**TINY, state_size=4), "layers of the kind linear_attention"),
    (hf.Lfm2Config(**TINY, **HEADS, layer_types=["conv", "full_attention"]), "layers of the kind conv"),
    (hf.Llama4TextConfig(**TINY, **HEADS, num_local_experts=2), "layers of the kind chunked_attention"),
    (hf.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1), "recurrent state"),
    (hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True), "cross-attention"),
    (hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2), "computes its attention itself"),
    (hf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "is not causal"),
    (hf.DogeConfig(**TINY, **HEADS), "computes with its mask"),
    (hf.NemotronConfig(**TINY, **HEADS), "does not pass on its keyword arguments"),
]


@pytest.mark.parametrize(("config", "reason"), UNPACKABLE)
def test_models_that_mix_documents_are_refused_by_name(config, reason):
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanError, match=reason):
        install(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_of_the_zoo_is_packable(name):
    assert packable(build(name)) is None


def test_a_block_without_attention_is_refused():
    blocks = [SimpleNamespace(mixer="attention"), SimpleNamespace(mixer="other")]
    assert "block 1 of LlamaForCausalLM" in packable(build("llama"), SimpleNamespace(blocks=blocks))
    assert packable(build("llama"), SimpleNamespace(blocks=blocks[:1])) is None


def test_a_convolution_over_tokens_is_refused_by_its_name():
    model = build("llama")
    model.model.layers[1].mixer = torch.nn.Conv1d(4, 4, 3)
    assert packable(model).startswith("model.layers.1.mixer of LlamaForCausalLM is a convolution")


def test_a_plain_module_is_not_a_transformers_model():
    assert "not a transformers model" in packable(torch.nn.Linear(2, 2))


class Deaf(torch.nn.Module):
    """Takes keyword arguments, and keeps them to itself."""

    def forward(self, x, **kwargs):
        return self.inner(x)


class Open(torch.nn.Module):
    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


def test_a_module_that_keeps_keyword_arguments_is_found_out():
    assert _receivers(Deaf) == frozenset()
    assert _receivers(Open) == {"self.inner"}


def test_a_model_whose_block_keeps_keyword_arguments_is_refused():
    model = build("llama")
    inner = model.model.layers[1]
    model.model.layers[1] = Deaf()
    model.model.layers[1].inner = inner
    assert packable(model) == "Deaf (model.layers.1) does not pass on its keyword arguments"


def test_attention_dropout_in_training_is_refused_and_in_evaluation_is_not():
    config = ARCHITECTURES["llama"]()
    config.attention_dropout = 0.1
    model = hf.AutoModelForCausalLM.from_config(config)
    install(model)
    given = packed(tokens())
    model.eval()(**given)
    with pytest.raises(PlanError, match=r"p = 0\.1.*dropout: off"):
        model.train()(**given)


def test_padding_beside_documents_is_refused():
    model = build("llama")
    install(model)
    given = packed(tokens())
    mask = torch.ones_like(given["input_ids"])
    mask[0, -1] = 0
    with pytest.raises(PlanError, match="leave the mask out"):
        model(**given, attention_mask=mask)


def test_two_rows_of_documents_are_refused():
    model = build("llama")
    install(model)
    given = packed(tokens())
    with pytest.raises(PlanError, match="2 rows"):
        model(**given | {"input_ids": given["input_ids"].repeat(2, 1)})


def test_documents_after_a_cache_are_refused():
    model, ids = build("llama"), tokens((9,))
    install(model)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(PlanError, match="use_cache=False"):
        model(ids, past_key_values=cache, documents=Documents.of([9]))


def test_documents_of_another_row_are_refused():
    model = build("llama")
    install(model)
    with pytest.raises(DataError, match="add up to the row"):
        model(**packed(tokens()) | {"documents": Documents.of(LENGTHS[1:])})


def test_a_mask_that_disagrees_with_the_told_window_is_refused():
    model = build("mistral")
    install(model)
    model.model.config.sliding_window = None  # the mask is now full; the layers were made with a window
    for layer in model.model.layers:
        layer.self_attn.config = build("mistral").config
        layer.self_attn.config._attn_implementation = "treering"
    with pytest.raises(PlanError, match=r"local size of None.*sliding window of 8"):
        model(**packed(tokens()))


def test_masks_with_rules_of_their_own_are_recognised():
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

    config = ARCHITECTURES["llama"]()
    install(build("llama"))
    config._attn_implementation = "treering"
    x = torch.zeros(1, 6, 32)
    given = {"config": config, "inputs_embeds": x, "attention_mask": None, "past_key_values": None}
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2]])
    packed_mask = create_causal_mask(**given, position_ids=restarting)
    assert isinstance(packed_mask, DeferredMask)
    assert not packed_mask.has_other_rule
    blocks = create_causal_mask(**given, block_sequence_ids=torch.tensor([[0, 0, -1, 1, 1, -1]]))
    overlaid = create_causal_mask(**given, or_mask_function=lambda b, h, q, k: k == 0)
    both_ways = create_bidirectional_mask(**{k: v for k, v in given.items() if k != "past_key_values"})
    assert blocks.has_other_rule and overlaid.has_other_rule and both_ways.has_other_rule


def test_a_mask_is_only_put_off_where_documents_can_be():
    given = {"batch_size": 1, "q_length": 4, "kv_length": 4, "device": "cpu", "use_vmap": False}
    assert isinstance(deferred_mask(**given), DeferredMask)
    padded = deferred_mask(**given, attention_mask=torch.tensor([[False, True, True, True]]))
    assert padded.shape == (1, 1, 4, 4)
    assert not isinstance(deferred_mask(**given | {"kv_length": 7, "q_offset": 3}), DeferredMask)


def test_rotary_embeddings_that_look_at_the_longest_document_are_refused_only_where_they_would_mix():
    long = SimpleNamespace(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 32})
    assert rope_conflict(long, [8, 32]) is None
    assert rope_conflict(long, [40, 33]) is None
    assert "1 of 2 packed documents are longer than 32" in rope_conflict(long, [8, 33])
    assert rope_conflict(long, [33]) is None
    dynamic = SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "dynamic"}}, max_position_embeddings=32)
    assert rope_conflict(dynamic, [8, 32]) is None
    assert "2 of 2" in rope_conflict(dynamic, [40, 33])
    assert rope_conflict(None, [1, 2]) is None


def test_a_long_document_that_would_change_the_rotary_embedding_of_others_is_refused_in_the_model():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    sizes = TINY | {"num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": None, "vocab_size": 128}
    config = hf.Phi3Config(**sizes, original_max_position_embeddings=64, rope_parameters=rope)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    install(model)
    with pytest.raises(PlanError, match="longer than 64 tokens"):
        model(**packed(tokens()))
