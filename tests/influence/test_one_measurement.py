"""One folder of `treering measure --gradients` serves three: protection, starts of adapters, influence."""

import treering as tr
from tests.curvature.texts import documents, packed
from tests.influence.test_build import texts
from tests.same import assert_same
from tests.zoo import build as model_of
from treering.curvature import GradientSettings, measure
from treering.curvature import open as open_statistics
from treering.influence import build


def test_protection_starts_and_influence_use_one_measurement(tmp_path):
    model = model_of("llama")
    batches = [packed(documents((40, 60, 30), seed=i)) for i in range(3)]
    frozen = tr.compose(model_of("llama"), [], frozen=True)
    measure(frozen, batches, gradients=GradientSettings(kind="ekfac"), to=tmp_path / "known")
    statistics = open_statistics(tmp_path / "known")
    protected = tr.compose(model_of("llama"), [tr.OSFT(protect="inputs")], statistics=statistics)
    assert len(protected.trainable()) == 14
    adapted = tr.compose(
        model_of("llama"), [tr.Quantize(format="int8"), tr.LoRA(rank=4, init="activation")], statistics=statistics
    )
    assert any(bool(p.any()) for name, p in adapted.trainable() if name.endswith(".B"))
    index = build(frozen, texts(), tmp_path / "index", statistics=statistics, capacity=64)
    assert len(list(index.all_ids())) == len(texts())
    # The inputs are those of a measurement of inputs, but for the last token of each document, which has no gradient.
    [document] = documents((40,))
    plain = tr.measure(model, [{"input_ids": document[None, :-1]}])
    both = measure(model, [{"input_ids": document[None]}], gradients=GradientSettings(kind="kfac"))
    for weight in plain:
        assert_same(both[weight]["inputs"], plain[weight]["inputs"], 2e-6, weight)
        assert int(both[weight]["tokens"]) == int(plain[weight]["tokens"]) == 39
