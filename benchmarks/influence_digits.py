"""Ground truth for influence on scikit-learn's digits: a small MLP with biases, retrained on 100 random halves.

    python -m benchmarks.influence_digits [--folder FOLDER]     prints the LDS of each kind

Seconds, not minutes: all halves are trained at once, by full-batch gradient descent. There is nothing random in it
but the choice of documents, so that it shows what an approximation of curvature costs: the dense Gauss–Newton matrix,
which has 4,810 rows, is the ceiling of all of them. The 1,797 images come from scikit-learn, which need not be
installed here: without a cache they are fetched through the environment of `benchmarks.peers.influence`.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import influence_oracle as oracle
from benchmarks.influence_text import cache, one_thread
from benchmarks.peers import influence as peer
from treering.core import seeds

SIZES = (64, 64, 10)
STEPS, LR, MOMENTUM, DECAY = 150, 0.2, 0.9, 1e-3
Weights = list[Tensor]  # of each layer [..., outputs, inputs + 1]: the bias is the column of a constant input


@dataclass(frozen=True, kw_only=True)
class DigitsTruth:
    """Attributes: weights of the model trained on all; images and labels; halves and the queries' losses after them."""

    weights: Weights
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    subsets: NDArray[np.bool_]
    losses: NDArray[np.float64]


def ground_truth(*, folder: Path | None = None, seed: int = 0, documents: int = 500, queries: int = 100) -> DigitsTruth:
    """Return the truth; it is not stored, only the images are."""
    data = load_file(images(folder or cache()))
    random = np.random.default_rng(seeds.derive(seed, "digits"))
    chosen = torch.from_numpy(random.permutation(len(data["labels"]))[: documents + queries])
    pictures, labels = data["images"][chosen], data["labels"][chosen]
    train, query = (pictures[:documents], labels[:documents]), (pictures[documents:], labels[documents:])
    subsets = np.stack([random.permutation(documents) < documents // 2 for _ in range(100)])
    with one_thread():
        trained = fit(initial(seed), train, torch.from_numpy(subsets))
        weights = [W[0] for W in fit(initial(seed), train, torch.ones(1, documents, dtype=torch.bool))]
        losses = cross_entropy(trained, query).double().numpy()
    return DigitsTruth(weights=weights, train=train, queries=query, subsets=subsets, losses=losses)


def initial(seed: int) -> Weights:
    """Return uniform weights within ±1/√inputs, biases too: as nn.Linear has them."""
    generator = seeds.generator(seed, "digits", "weights")
    return [(torch.rand(out, into + 1, generator=generator) * 2 - 1) * into**-0.5 for into, out in pairwise(SIZES)]


def fit(first: Weights, train: tuple[Tensor, Tensor], subsets: Tensor) -> Weights:
    """Return weights [subsets, …] after full-batch gradient descent on the mean loss of each subset."""
    weights = [W.expand(len(subsets), *W.shape).clone().requires_grad_() for W in first]
    share = subsets / subsets.sum(1, keepdim=True)
    optimizer = torch.optim.SGD(weights, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for _ in range(STEPS):
        loss = (cross_entropy(weights, train) * share).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [W.detach() for W in weights]


def forward(weights: Weights, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs with their constant, and outputs, of each layer."""
    inputs, outputs = [], []
    for number, W in enumerate(weights):
        x = torch.cat([x.relu() if number else x, x.new_ones(*x.shape[:-1], 1)], -1)
        inputs.append(x)
        x = x @ W.mT
        outputs.append(x)
    return inputs, outputs


def cross_entropy(weights: Weights, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of each image, [..., images], the same images for all weights."""
    images, labels = data
    logits = forward(weights, images.expand(*weights[0].shape[:-2], *images.shape))[1][-1]
    return -logits.log_softmax(-1).gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]


def pairs(weights: Weights, data: tuple[Tensor, Tensor], labels: Tensor | None = None) -> list[oracle.Pairs]:
    """Return a and g of every layer, image by image; their own labels, or those given."""
    with torch.enable_grad():
        inputs, outputs = forward([W.clone().requires_grad_() for W in weights], data[0])
        loss = torch.nn.functional.cross_entropy(outputs[-1], data[1] if labels is None else labels, reduction="sum")
        gradients = torch.autograd.grad(loss, outputs)
    return [
        {str(layer): (a[i : i + 1].detach(), g[i : i + 1]) for layer, (a, g) in enumerate(zip(inputs, gradients))}
        for i in range(len(data[1]))
    ]


def stacked(found: list[oracle.Pairs]) -> oracle.Rows:
    """Return G of every image by layer."""
    return {name: torch.stack([one[name][1].T @ one[name][0] for one in found]) for name in found[0]}


def gauss_newton(truth: DigitsTruth, queries: oracle.Rows, train: oracle.Rows, damping: float) -> Tensor:
    """Return scores by the dense matrix (1/N) Σ Jᵀ(diag p − ppᵀ)J + damping · I."""
    flat = lambda rows: torch.cat([x.flatten(1) for x in rows.values()], 1).double()  # noqa: E731
    logits = forward(truth.weights, truth.train[0])[1][-1]
    p = logits.softmax(1).double()
    # Rows √p_c · ∂(−log p_c): the sum over classes of their squares is Jᵀ(diag p − ppᵀ)J.
    classes = range(SIZES[-1])
    rows = [flat(stacked(pairs(truth.weights, truth.train, torch.full_like(truth.train[1], c)))) for c in classes]
    J = torch.cat([p[:, c, None].sqrt() * rows[c] for c in classes])
    H = J.T @ J / len(p)
    H.diagonal().add_(damping)
    return flat(queries) @ torch.cholesky_solve(flat(train).T, torch.linalg.cholesky(H))


def images(folder: Path) -> Path:
    """Return the file of the images, written first if it is not there."""
    path = folder / "digits.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        peer.environment.ask(
            peer.environment.python("influence", peer.PACKAGES, proof=peer.PROOF),
            "benchmarks.influence_digits", "--images", str(path),
        )  # fmt: skip
    return path


def write_images(path: Path) -> None:
    """Write scikit-learn's digits, each pixel between 0 and 1."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {"images": torch.from_numpy(pictures / 16).float(), "labels": torch.from_numpy(labels).long()}, unfinished
    )
    unfinished.replace(path)


def main() -> None:
    from treering.influence.lds import Retrained, lds

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="default: the user's cache")
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images:
        write_images(options.images)
        sys.stdout.write("true\n")
        return
    truth = ground_truth(folder=options.folder)
    retrained = Retrained(truth.subsets, truth.losses)
    print(f"mean loss of the queries {truth.losses.mean():.3f}, standard deviation {truth.losses.std(0).mean():.4f}")
    logits = forward(truth.weights, truth.train[0])[1][-1].softmax(1)
    draw = lambda n: torch.multinomial(logits, 1, generator=seeds.generator(0, "labels", n))[:, 0]  # noqa: E731
    data, first, second = (pairs(truth.weights, truth.train, one) for one in (None, draw(0), draw(1)))
    Q, G = stacked(pairs(truth.weights, truth.queries)), stacked(data)
    H = {kind: oracle.fitted(first, stacked(second) if kind == "ekfac" else None, kind=kind)
         for kind in ("kfac", "ekfac", "shampoo", "tkfac")}  # fmt: skip
    table = {
        "random": torch.randn(len(truth.queries[1]), len(data), generator=seeds.generator(0, "random")),
        "gradient dot": oracle.scores(Q, G, None),
        **{kind: oracle.scores(Q, G, one) for kind, one in H.items()},
        "ekfac, dataset labels": oracle.scores(Q, G, oracle.fitted(data, G, kind="ekfac")),
        **{f"dense Gauss–Newton + {c:g}": gauss_newton(truth, Q, G, c) for c in (1e-3, 1e-2)},
    }
    for name, one in table.items():
        print(f"{name:32} {lds(one, retrained, draws=200)}", flush=True)


if __name__ == "__main__":
    main()
