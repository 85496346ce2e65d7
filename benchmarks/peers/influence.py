"""bergson 2.5.1, kronfluence 1.0.1 and dattri-llm 0.1.0: scores and times of the same model, documents and thread.

python -m benchmarks.peers.influence [--case text | wide]     makes the environment, prints what was measured

`scores`, `sketches`, `collection` and `fits` are what `benchmarks.influence` asks for. torchvision, torchaudio and
bitsandbytes, which bergson declares, are not needed on a CPU.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers import environment
from benchmarks.peers import influence_sides as sides
from benchmarks.peers.influence_sides import Case

PACKAGES = (
    "bergson==2.5.1",
    "kronfluence==1.0.1",
    "dattri==0.3.0",
    "dattri-llm==0.1.0",
    "cloudpickle==3.1.2",
    "docstring-parser==0.18.0",
    "einconv==0.1.0",
    "einops==0.8.2",
    "graphviz==0.21",
    "jaxtyping==0.3.11",
    "joblib==1.6.0",
    "ml_dtypes==0.6.0",
    "narwhals==2.29.0",
    "natsort==8.4.0",
    "opt_einsum==3.4.0",
    "optree==0.20.0",
    "petname==2.9",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "simple-parsing==0.1.9",
    "threadpoolctl==3.8.0",
    "torchopt==0.7.3",
    "wadler-lindig==0.1.8",
)
PROOF = "bergson.hessians.pipeline, kronfluence.analyzer, dattri_llm.attribution, sklearn.datasets"
SCORES = {"bergson": sides.bergson_scores, "kronfluence": sides.kronfluence_scores, "dattri": sides.dattri_scores}
FITS = {"bergson": sides.bergson_fit, "kronfluence": sides.kronfluence_fit}


def ask(*arguments: str) -> Any:
    """A figure from inside the environment, which is made if it is not there."""
    python = environment.python("influence", PACKAGES, proof=PROOF)
    return environment.ask(python, "benchmarks.peers.influence", *arguments)


def scores(case: Case, package: str, **settings: Any) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Return scores [queries, documents] of a package, and its CPU seconds by step.

    Args:
        package: bergson (method, p, labels, ranks), kronfluence (method, labels) or dattri (method).
    """
    found = _asked(case, "scores", package, json.dumps(settings))
    return np.array(found["scores"]), found["seconds"]


def sketches(case: Case, dimensions: Sequence[int], labels: str = "data") -> dict[int, NDArray[np.float64]]:
    """Return bergson's K-FAC scores whole (0) and at each p, all from the same factors."""
    found = _asked(case, "sketches", json.dumps({"dimensions": list(dimensions), "labels": labels}))
    return {int(p): np.array(one) for p, one in found["scores"].items()}


def collection(case: Case, dimensions: Sequence[int], rounds: int, ours: str = "") -> dict[str, list[float]]:
    """Return tokens/s of collecting an index: bergson's at each p, and of forward and backward alone, by round.

    Args:
        ours: `module:function` for more sides of the same rounds, imported there and called with (case, folder); it
            returns what each side runs, by name.
    """
    seconds = _asked(case, "collection", json.dumps(list(dimensions)), str(rounds), ours)
    return {name: [case.tokens / one for one in times] for name, times in seconds.items()}


def fits(case: Case, methods: Sequence[str], rounds: int, ours: str = "") -> dict[str, list[float]]:
    """Return CPU seconds of fitting factors with labels of the dataset, by package and method, by round."""
    return _asked(case, "fits", json.dumps(list(methods)), str(rounds), ours)


def _asked(case: Case, *arguments: str) -> Any:
    with tempfile.TemporaryDirectory() as name:
        return ask(str(case.write(Path(name) / "case.json")), name, *arguments)


def inside(case: Case, work: Path, command: str, *arguments: str) -> Any:
    """What each command does in the environment."""
    if command == "scores":
        package, settings = arguments
        return SCORES[package](case, work, **json.loads(settings))
    if command == "sketches":
        return sides.bergson_sketches(case, work, **json.loads(arguments[0]))
    which, rounds, ours = json.loads(arguments[0]), int(arguments[1]), arguments[2]
    made: dict[str, Callable[[], None]] = {}
    if command == "collection":
        made |= {f"bergson, p = {p}": sides.bergson_collection(case, work, p=p) for p in which}
        made["forward and backward"] = sides.forward_backward(case)
    else:
        made |= {f"{name}, {method}": FITS[name](case, work, method=method) for name in FITS for method in which}
    if ours:
        module, function = ours.split(":")
        made |= getattr(importlib.import_module(module), function)(case, work)
    return sides.alternating(made, rounds)


def main() -> None:
    if len(sys.argv) > 3 and Path(sys.argv[1]).is_file():
        torch.set_num_threads(1)
        path, work, *arguments = sys.argv[1:]
        with sides.quiet():
            found = inside(Case.read(Path(path)), Path(work), *arguments)
        print(json.dumps(found), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("text", "wide"), default="text")
    options = parser.parse_args()
    report(options.case)


def report(name: str) -> None:
    """Compare the packages with the oracle, and with ground truth on the text benchmark."""
    from benchmarks import influence_oracle as oracle
    from benchmarks import influence_text as text
    from treering.influence.lds import Retrained, lds, spearman

    torch.set_num_threads(1)
    truth = text.ground_truth() if name == "text" else text.material(setting=text.WIDE)
    folder = truth.model if isinstance(truth, text.TextTruth) else truth.base
    case = Case(model=str(folder), train=truth.train.tolist(), queries=truth.queries.tolist())
    model = case.opened()
    G, Q = oracle.rows(model, truth.train), oracle.rows(model, truth.queries)
    kinds = ("kfac", "ekfac", "shampoo", "tkfac")
    H = {kind: oracle.curvature(model, list(truth.train), None, kind=kind) for kind in kinds}
    exact = {kind: oracle.scores(Q, G, one).numpy() for kind, one in H.items()}
    factored = oracle.scores(Q, G, H["kfac"], factored=True).numpy()
    asked: list[tuple[str, dict[str, Any]]] = [("bergson", {"method": kind}) for kind in kinds]
    asked += [(package, {"method": kind}) for package in ("kronfluence", "dattri") for kind in ("kfac", "ekfac")]
    for package, settings in asked:
        found, seconds = scores(case, package, **settings)
        own = factored if (package, settings["method"]) == ("dattri", "kfac") else exact[settings["method"]]
        near = spearman(found, own).mean()
        scale = (found * own).sum() / (own * own).sum()
        apart = np.abs(found / scale - own).max() / np.abs(own).max()
        line = f"{package} {settings}: to the oracle ρ {near:.5f}, apart {apart:.1e} after a factor {scale:.4g}"
        if isinstance(truth, text.TextTruth):
            line += f"; LDS {lds(found, Retrained(truth.subsets, truth.losses), draws=200)}"
        print(f"{line}; {seconds}", flush=True)
    compressed = sketches(case, (16, 32, 64, 128), "sampled")
    for p, found in compressed.items():
        line = f"bergson, sampled labels, p = {p}: ρ {spearman(found, compressed[0]).mean():.3f} to its own p = 0"
        if isinstance(truth, text.TextTruth):
            line += f"; LDS {lds(found, Retrained(truth.subsets, truth.losses), draws=200)}"
        print(line, flush=True)
    for figure, values in (collection(case, (0, 16, 64), 3) | fits(case, ("kfac", "ekfac"), 3)).items():
        print(figure, [f"{value:.4g}" for value in values], flush=True)


if __name__ == "__main__":
    main()
