"""A second implementation of influence by Kronecker factors: plain torch, document by document, no code of ours in it.

    python -m benchmarks.influence_oracle [--folder FOLDER]     the LDS of each kind on the text benchmark

What counts, here as in bergson and kronfluence: every linear inside the blocks, neither head nor embedding nor norms.
A document's loss is the *sum* over its tokens; position t predicts token t + 1, so the last position has no label, its
gradient is zero, and it is in neither A nor S nor their number of tokens. In float64 when the model is.

    G_n = Σ_t g_t a_tᵀ    A = Σ a aᵀ / T    S = Σ g gᵀ / T    grid λ = λ_S ⊗ λ_A · T / N: the Fisher of a document
    EK-FAC: Λ = Σ_n (Q_Sᵀ G_n Q_A)² / N               shampoo: A = Σ GᵀG, S = Σ GGᵀ, scaled to tr = Σ |G|² / N
    TKFAC: A = Σ |g|² a aᵀ, S = Σ |a|² g gᵀ, scaled to tr = Σ |G|² / N
    joint damping: 1 / (λ + c · mean λ)
    factored damping: 1 / ((λ_S + c · mean λ_S) ⊗ (λ_A + c · mean λ_A) · T / N)
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Pairs = dict[str, tuple[Tensor, Tensor]]  # module -> inputs [T, I] and gradients of outputs [T, O] of one document
Rows = dict[str, Tensor]  # module -> [documents, O, I]


def pairs(model: Any, ids: Tensor, labels: Tensor | None = None) -> Pairs:
    """Return a and g of every linear of the blocks for one document; its own tokens are the labels, or those given."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name}.weight"] = (args[0], output)

        return keep

    head = model.get_output_embeddings()
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    for handle in handles:
        handle.remove()
    targets = ids[1:] if labels is None else labels
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    return {name: (a[0, :-1].detach(), g[0, :-1]) for (name, (a, _)), g in zip(seen.items(), gradients)}


def rows(model: Any, documents: Iterable[Tensor], labels: Sequence[Tensor] | None = None) -> Rows:
    """Return G_n of every document, stacked by module."""
    every = [
        {name: g.T @ a for name, (a, g) in pairs(model, ids, labels[i] if labels is not None else None).items()}
        for i, ids in enumerate(documents)
    ]
    return {name: torch.stack([one[name] for one in every]) for name in every[0]}


def sampled(model: Any, documents: Iterable[Tensor], seed: int = 0) -> list[Tensor]:
    """Return labels drawn from what the model predicts, by a generator of each document."""
    labels = []
    for number, ids in enumerate(documents):
        with torch.no_grad():
            p = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().softmax(-1)
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        labels.append(torch.multinomial(p, 1, generator=generator)[:, 0])
    return labels


@dataclass
class Curvature:
    """Of one module: H = Q (λ_S ⊗ λ_A · scale) Qᵀ, or with corrected eigenvalues Λ in place of their product."""

    Q_A: Tensor
    E_A: Tensor
    Q_S: Tensor
    E_S: Tensor
    scale: float
    corrected: Tensor | None = None

    def damped(self, c: float, factored: bool) -> Tensor:
        """Return the damped eigenvalues, [O, I]."""
        if factored:
            return torch.outer(self.E_S + c * self.E_S.mean(), self.E_A + c * self.E_A.mean()) * self.scale
        grid = torch.outer(self.E_S, self.E_A) * self.scale if self.corrected is None else self.corrected
        return grid + c * grid.mean()

    def rotated(self, G: Tensor) -> Tensor:
        """Return Q_Sᵀ G Q_A."""
        return self.Q_S.T @ G @ self.Q_A


def curvature(
    model: Any, documents: Sequence[Tensor], labels: Sequence[Tensor] | None, *, kind: str, again: Any = None
) -> dict[str, Curvature]:
    """Return the curvature of every module.

    Args:
        labels: of each document, sampled; None takes the documents' own tokens.
        kind: kfac, ekfac, shampoo or tkfac.
        again: labels of the second pass, that of Λ; None takes the same ones.
    """
    given = labels if labels is not None else [None] * len(documents)
    first = (pairs(model, ids, one) for ids, one in zip(documents, given))
    second = rows(model, documents, labels if again is None else again) if kind == "ekfac" else None
    return fitted(first, second, kind=kind)


def fitted(documents: Iterable[Pairs], second: Rows | None, *, kind: str) -> dict[str, Curvature]:
    """Return the curvature of every module from a and g of each document, and for ekfac the G of a second pass."""
    sums: dict[str, list[Tensor]] = {}
    tokens = number = 0
    for document in documents:
        number += 1
        tokens += len(next(iter(document.values()))[0])
        for name, (a, g) in document.items():
            G = g.T @ a
            if kind == "shampoo":
                new = [G.T @ G, G @ G.T]
            elif kind == "tkfac":
                new = [(a.T * (g * g).sum(1)) @ a, (g.T * (a * a).sum(1)) @ g]
            else:
                new = [a.T @ a, g.T @ g]
            new.append((G * G).sum())
            sums[name] = [old + one for old, one in zip(sums[name], new)] if name in sums else new
    found = {}
    for name, (A, S, squares) in sums.items():
        if kind in ("kfac", "ekfac"):
            A, S, scale = A / tokens, S / tokens, tokens / number
        else:
            scale = float(squares / number / (A.trace() * S.trace()))
        (E_A, Q_A), (E_S, Q_S) = (torch.linalg.eigh(C.double()) for C in (A, S))
        found[name] = Curvature(*(x.to(A.dtype) for x in (Q_A, E_A.clamp_min(0), Q_S, E_S.clamp_min(0))), scale)
    for name, G in (second or {}).items():
        found[name].corrected = found[name].rotated(G).square().mean(0)
    return found


def scores(
    queries: Rows, train: Rows, H: dict[str, Curvature] | None, *, c: float = 0.1, factored: bool = False
) -> Tensor:
    """Return Σ_modules ⟨G_q, H⁻¹ G_n⟩, [queries, documents]; without H the gradient dot product."""
    total: Any = 0
    for name, G in train.items():
        Q = queries[name]
        if H is not None:
            Q, G = H[name].rotated(Q) / H[name].damped(c, factored), H[name].rotated(G)
        total = total + Q.flatten(1) @ G.flatten(1).T
    return total


def top_coordinates(queries: Rows, train: Rows, H: dict[str, Curvature], k: int, *, c: float = 0.1) -> Tensor:
    """Return scores from the k largest coordinates of each document and module, in the whitened eigenbasis."""
    total: Any = 0
    for name, G in train.items():
        root = H[name].damped(c, False).sqrt()
        Q, W = ((H[name].rotated(x) / root).flatten(1) for x in (queries[name], G))
        places = W.abs().topk(k, 1).indices
        total = total + Q @ torch.zeros_like(W).scatter(1, places, W.gather(1, places)).T
    return total


def sketched(queries: Rows, train: Rows, H: dict[str, Curvature], p: int, *, c: float = 0.1, seed: int = 0) -> Tensor:
    """Return scores from R H^(−½) of both sides, [p, p] numbers a module; factored damping, Rademacher ±1/√p."""
    total: Any = 0
    for number, (name, G) in enumerate(train.items()):
        one, sides = H[name], []
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        for Q, E in ((one.Q_S, one.E_S), (one.Q_A, one.E_A)):
            R = torch.randint(0, 2, (p, len(E)), generator=generator).to(Q.dtype) * 2 - 1
            sides.append(R / math.sqrt(p) @ (Q / (E + c * E.mean()).sqrt()) @ Q.T)
        q, n = ((sides[0] @ x @ sides[1].T).flatten(1) for x in (queries[name], G))
        total = total + q @ n.T / one.scale
    return total


def bm25(queries: Iterable[Tensor], documents: Sequence[Tensor], *, k: float = 1.5, b: float = 0.75) -> Tensor:
    """Return Okapi BM25 on tokens, [queries, documents]."""
    counts = [Counter(ids.tolist()) for ids in documents]
    having = Counter(token for one in counts for token in one)
    mean = sum(map(len, documents)) / len(documents)
    table = []
    for ids in queries:
        line = []
        for one, document in zip(counts, documents):
            norm = k * (1 - b + b * len(document) / mean)
            line.append(
                sum(
                    math.log(1 + (len(documents) - having[t] + 0.5) / (having[t] + 0.5))
                    * one[t]
                    * (k + 1)
                    / (one[t] + norm)
                    for t in ids.tolist()
                )
            )
        table.append(line)
    return torch.tensor(table, dtype=torch.float64)


def main() -> None:
    from transformers import AutoModelForCausalLM

    from benchmarks.influence_text import ground_truth
    from treering.influence.lds import Retrained, chance, lds, paired_difference

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="default: the user's cache")
    parser.add_argument("--double", action="store_true", help="float64")
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth = ground_truth(folder=options.folder)
    dtype = torch.float64 if options.double else torch.float32
    model = AutoModelForCausalLM.from_pretrained(truth.model, dtype=dtype).eval()
    retrained = Retrained(truth.subsets, truth.losses)
    train, queries = list(truth.train), list(truth.queries)
    G, Q = rows(model, train), rows(model, queries)
    labels, again = sampled(model, train), sampled(model, train, seed=1)
    H = {
        kind: curvature(model, train, labels, kind=kind, again=again) for kind in ("kfac", "ekfac", "shampoo", "tkfac")
    }
    own = {kind: curvature(model, train, None, kind=kind) for kind in ("kfac", "ekfac")}
    table = {
        "random": torch.randn(len(queries), len(train), generator=torch.Generator().manual_seed(0)),
        "gradient dot": scores(Q, G, None),
        "BM25": bm25(queries, train),
        **{kind: scores(Q, G, one) for kind, one in H.items()},
        **{f"{kind}, dataset labels": scores(Q, G, one) for kind, one in own.items()},
        **{f"ekfac, damping {c}": scores(Q, G, H["ekfac"], c=c) for c in (0.01, 1.0)},
        "kfac, factored damping": scores(Q, G, H["kfac"], factored=True),
        **{f"psift p = {p}": sketched(Q, G, H["kfac"], p) for p in (16, 32)},
        **{f"eigen-topk, {k} coordinates": top_coordinates(Q, G, H["ekfac"], k) for k in (42, 85, 170, 340)},
    }
    for name, one in table.items():
        versus = paired_difference(one, table["BM25"], retrained)
        line = f"{name:32} {lds(one, retrained)}   chance {chance(one, retrained):.3f}"
        print(f"{line}   minus BM25 {versus.value:+.3f} [{versus.low:+.3f}, {versus.high:+.3f}]", flush=True)


if __name__ == "__main__":
    main()
