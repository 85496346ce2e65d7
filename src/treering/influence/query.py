"""The rows of queries, and their scores in an index.

    score(query, document) = Σ over modules ⟨G_query, H⁻¹ G_document⟩

Positive: training on the document lowers the query's loss, to first order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from treering.data.document import Document
from treering.influence.sketched import Sketched


def query_rows(sketched: Sketched, documents: Sequence[Document], *, together: bool = False) -> dict[str, Tensor]:
    """Return what `Index.score` takes: of each module the numbers [queries, numbers]. A collective.

    Args:
        sketched: of the index's run and settings.
        documents: the queries, each with its own loss.
        together: one query whose loss is the sum of all of them.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in sketched.maps}
    with sketched.rows(query=True) as rows_of:
        for document in documents:
            for name, row in rows_of([document], lambda module, x: x.float().cpu()).items():
                found[name].append(row)
    rows = {name: torch.cat(each) for name, each in found.items()}
    return {name: x.sum(0, keepdim=True) for name, x in rows.items()} if together else rows
