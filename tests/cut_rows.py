"""A technique that serves the mesh's `sequence` axis without any exchange: what rows mean there is all that it shows.

documents   a packed row is cut between two of its documents: each rank computes its own ones
targets     each rank computes the row and is trained on its part of the targets
copies      every rank is trained on the row: nothing is cut
lost        the first rank is trained on nothing, which is wrong: it is to be refused
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from treering.attention import Documents
from treering.technique import Applied, Claim, Stage


@dataclass(frozen=True, kw_only=True)
class CutRows:
    how: Literal["documents", "targets", "copies", "lost"]

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy: Any, mesh: Any) -> list[Claim]:
        return [Claim(fqn="", aspect="attention")]

    def apply(self, model: Any, site: Any) -> Applied:
        axis = site.mesh["sequence"] if site.mesh is not None else None
        part, parts = (axis.get_local_rank(), axis.size()) if axis is not None else (0, 1)

        def batch(batch: dict[str, Any]) -> dict[str, Any]:
            return cut(batch, part, parts, self.how)

        return Applied(batch=batch)


def cut(batch: dict[str, Any], part: int, parts: int, how: str) -> dict[str, Any]:
    """Return the part of the row that rank `part` of `parts` computes: every tensor of the row's length is cut."""
    length = batch["input_ids"].shape[1]
    if how == "copies" or parts == 1:
        return batch
    if how in ("targets", "lost"):
        mine = torch.arange(length) * parts // length == part
        mine &= how == "targets" or part > 0
        return {**batch, "targets": batch["targets"].masked_fill(~mine, -100)}
    documents = batch.get("documents")
    if documents is None:
        return batch
    border = [len(documents.lengths) * p // parts for p in range(parts + 1)]
    ends = [sum(documents.lengths[:b]) for b in border]
    rows = {
        name: value[:, ends[part] : ends[part + 1]]
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.shape[-1:] == (length,)
    }
    return {**batch, **rows, "documents": Documents.of(documents.lengths[border[part] : border[part + 1]])}
