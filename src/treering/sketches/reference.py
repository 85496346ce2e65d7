"""The plain truth of sketches: token by token, document by document, in float64. Slow; for tests."""

import torch
from torch import Tensor

from treering.sketches.rows import TokenSpans


def gradients(a_TM: Tensor, g_TN: Tensor, spans: TokenSpans, documents: int) -> Tensor:
    """Return G_n = Σ_t g_t a_tᵀ [documents, N, M]."""
    G = torch.zeros(documents, g_TN.shape[1], a_TM.shape[1], dtype=torch.float64)
    for number, start, stop in zip(spans.documents, spans.starts, spans.stops):
        for t in range(start, stop):
            G[number] += torch.outer(g_TN[t].double(), a_TM[t].double())
    return G


def power(moment: Tensor, damping: float, exponent: float) -> Tensor:
    """Return (C + damping · mean eigenvalue · I)^exponent of a symmetric C."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0)
    return vectors @ torch.diag((values + damping * values.mean()) ** exponent) @ vectors.T


def dense_power(A: Tensor, S: Tensor, damping: float, exponent: float) -> Tensor:
    """Return (S ⊗ A + damping · mean eigenvalue · I)^exponent [N·M, N·M], for gradients flattened by rows."""
    return power(torch.kron(S.double(), A.double()), damping, exponent)


def largest(row: Tensor, count: int) -> Tensor:
    """Return a row with zeros in place of all but its `count` largest elements by magnitude."""
    kept = sorted(range(len(row)), key=lambda i: (-abs(float(row[i])), i))[:count]
    result = torch.zeros_like(row)
    for i in kept:
        result[i] = row[i]
    return result


def coded(row: Tensor, most: int) -> Tensor:
    """Return a row rounded to whole multiples of its largest magnitude / most, with the scale as bfloat16 above it."""
    highest = float(row.abs().max())
    if highest == 0:
        return torch.zeros_like(row)
    scale = torch.tensor(highest / most, dtype=torch.float32)
    rounded = scale.bfloat16().float()
    while rounded < scale:
        rounded = torch.nextafter(rounded.bfloat16(), torch.tensor(torch.inf, dtype=torch.bfloat16)).float()
    return torch.round(row.float() / rounded).clamp(-most, most).double() * rounded.double()


def scores(documents: dict[str, Tensor], queries: dict[str, Tensor], unit: bool = False) -> Tensor:
    """Return Σ_modules ⟨document, query⟩ [documents, queries]; of rows with length 1 with `unit`."""
    d, q = (torch.cat([rows[m].double() for m in queries], 1) for rows in (documents, queries))
    if unit:
        d, q = (torch.where(x.norm(dim=1, keepdim=True) > 0, x / x.norm(dim=1, keepdim=True), 0) for x in (d, q))
    return d @ q.T
