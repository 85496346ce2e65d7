"""Labels are shifted once, before any technique sees a batch: then a row may be cut anywhere."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import treering as tr
from tests.toy import packed, rows
from tests.zoo import build
from treering.plan.batches import IGNORED, trained_tokens, with_targets
from treering.technique import Applied, Claim, Stage


def test_the_parts_of_a_cut_row_predict_what_the_row_predicts():
    for batch in (*rows(3), packed((5, 1, 7))):
        targets = with_targets(batch)["targets"]
        assert int((targets != IGNORED).sum()) == trained_tokens(batch["labels"])
        for cut in range(1, targets.shape[1]):
            parts = targets[:, :cut], targets[:, cut:]
            assert sum(int((part != IGNORED).sum()) for part in parts) == trained_tokens(batch["labels"])


@dataclass(frozen=True, kw_only=True)
class Front:
    """Keeps the first tokens of each row. With labels that the loss shifts, one target would be lost."""

    tokens: int
    seen: list = field(default_factory=list)

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy: Any, mesh: Any) -> list[Claim]:
        return []

    def apply(self, model: Any, site: Any) -> Applied:
        return Applied(batch=self.cut, tokens=lambda length: (range(self.tokens),))

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(set(batch))
        kept = {name: batch[name][:, : self.tokens] for name in ("input_ids", "targets")}
        return {"samples": batch["samples"], "count": batch["count"], **kept}


@pytest.mark.parametrize("loss", [[], [tr.TiledLoss(tile=4)]], ids=["plain", "tiled"])
def test_a_technique_that_cuts_a_row_loses_no_target(loss):
    batch = {**rows(1)[0], "attention_mask": None}
    whole = tr.compose(build("llama"), [tr.Full(), *loss])
    (ready,) = whole.ready([{**batch, "count": 1}])
    logits = whole.model(input_ids=batch["input_ids"]).logits[:, :5]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ready["targets"][:, :5].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    front = Front(tokens=5)
    cut = tr.compose(build("llama"), [tr.Full(), front, *loss])
    (part,) = cut.ready([{**batch, "count": 1}])
    torch.testing.assert_close(cut.loss(part), expected)
    assert "targets" in front.seen[0]


def test_a_batch_without_labels_or_a_count_is_refused():
    run = tr.compose(build("llama"), [tr.Full()])
    for missing in ("labels", "count"):
        batch = {**rows(1)[0], "count": 1}
        del batch[missing]
        with pytest.raises(tr.PlanError, match=r"what its tokens predict.*run.ready"):
            run.loss(batch)
