"""Models we never looked at: they work, or are refused in words that say what was missing and what to write."""

import random
import re
from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.anatomy import references
from tests.anatomy.shrink import Unbuildable, tiny
from tests.same import assert_same
from tests.zoo import ARCHITECTURES, build
from treering.anatomy import Anatomy, examine
from treering.core.errors import PlanError

IDS = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(7))
REFUSED = r"model: \{roles: |encoder-decoder|text-only|not causal|list of blocks|token embeddings"


def _strangers(seed: int) -> Iterator[hf.PreTrainedModel]:
    """Three causal language models of transformers outside the zoo, by a seeded choice among those it can build."""
    types = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(ARCHITECTURES))
    random.Random(seed).shuffle(types)
    for _ in range(3):
        while True:
            try:
                yield tiny(types.pop())
                break
            except Unbuildable:
                continue


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@torch.no_grad()
def test_strangers_work_or_are_refused_by_name(seed):
    for model in _strangers(seed):
        try:
            anatomy = examine(model)
        except PlanError as error:
            assert model.config.model_type in str(error) and re.search(REFUSED, str(error)), error
            continue
        assert list(anatomy.parameters) == [name for name, _ in model.named_parameters()]
        if next(model.parameters()).device.type != "meta":
            _assert_parts_replace(model, anatomy)


def _assert_parts_replace(model: hf.PreTrainedModel, anatomy: Anatomy) -> None:
    wanted = model(IDS, use_cache=False).logits
    if anatomy.head is not None and not anatomy.head.unknown:
        assert_same(references.logits_by_formula(model, anatomy, IDS), wanted, 1e-5, "head")
    references.linears(model, anatomy)
    assert_same(model(IDS, use_cache=False).logits, wanted, 1e-5, "linears")
    plain = all(block.mixer == "attention" for block in anatomy.blocks)
    if plain and all(part.interface and part.kind != "chunked_attention" for part in anatomy.attentions):
        references.attentions(model, anatomy)
        try:
            assert_same(model(IDS, use_cache=False).logits, wanted, 1e-5, "attentions")
        finally:
            references.forget_attention()


def test_a_parameter_without_a_role_is_named_and_can_be_given_one():
    model = tiny("doge")
    with pytest.raises(PlanError, match=r"doge: no role was found for model\.layers\.0\.input_residual") as error:
        examine(model)
    assert '"*.input_residual": other' in str(error.value)
    anatomy = examine(model, {"*.input_residual": "other", "*.post_attention_residual": "other"})
    assert [p.role for p in anatomy.parameters.values() if p.name.endswith("_residual")] == ["other"] * 8


def test_an_attention_can_be_declared_an_unknown_mixer():
    anatomy = examine(build("llama"), {"model.layers.1.self_attn": "mixer"})
    assert [block.mixer for block in anatomy.blocks] == ["attention", "other"]
    assert {p.role for p in anatomy.parameters.values() if ".1.self_attn." in p.name} == {"mixer"}
    assert len(anatomy.attentions) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"q_prj": "mlp"}, "'q_prj' matches no parameter"), ({"q_proj": "atention"}, "Did you mean 'attention'")],
)
def test_a_wrong_override_is_explained(overrides, message):
    with pytest.raises(PlanError, match=message):
        examine(build("llama"), overrides)


@pytest.mark.parametrize(
    ("model_type", "mixer"),
    [("mamba", "MambaMixer"), ("qwen3_next", "Qwen3NextGatedDeltaNet"), ("lfm3", "Lfm3ShortConv")],
)
def test_blocks_that_mix_tokens_otherwise_are_recorded(model_type, mixer):
    if model_type not in hf.CONFIG_MAPPING:
        pytest.skip(f"transformers {hf.__version__} has no {model_type}")
    others = [block for block in examine(tiny(model_type)).blocks if block.mixer == "other"]
    assert others and {block.mixer_class for block in others} == {mixer}


def test_encoder_decoders_and_senses_are_refused_by_name():
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 128}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    with torch.device("meta"):
        bart = hf.BartForConditionalGeneration(hf.BartConfig(**small, **heads))
        seeing = hf.Gemma3ForConditionalGeneration(hf.Gemma3Config())
        bert = hf.BertLMHeadModel(hf.BertConfig(num_hidden_layers=1))
    with pytest.raises(PlanError, match=r"bart .* is an encoder-decoder model"):
        examine(bart)
    with pytest.raises(PlanError, match=r"gemma3 .* is not a text-only model: it has vision_config"):
        examine(seeing)
    with pytest.raises(PlanError, match=r"bert: .* is not causal"):
        examine(bert)
    with pytest.raises(PlanError, match="Linear is not a transformers model"):
        examine(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_an_unknown_treatment_of_logits_is_recorded_not_guessed():
    class Strange(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.config.logit_temperature
            return out

    with torch.device("meta"):
        head = examine(Strange(ARCHITECTURES["llama"]())).head
    assert head is not None and head.unknown == ("logit_temperature",)
