"""bergson, kronfluence and dattri-llm on one case: a model's folder, training documents and queries, all as tokens.

What they count, found by comparing them with `benchmarks.influence_oracle` (dataset labels):

* All three take every linear of the base model; the head is not among bergson's, and is left out for the other two.
* Loss: the *sum* over a document's tokens. The gradient of a mean loss would weigh short documents more.
* bergson: A, S and their number of positions T go over a document's tokens without the last one, whose label is
  not there. λ = λ_S ⊗ λ_A · T / N with N documents; Λ is a mean over documents. Joint damping 0.1 · mean of the grid.
* kronfluence: an attention mask says what is in A, and its own language modelling example lets the last position in:
  A differs by one token in a document. Here the mask of the factors leaves it out. `damping_factor=None` is
  0.1 · mean of Λ. K-FAC's grid is λ_S ⊗ λ_A of two means over positions, so a constant T / N away from the others'.
* dattri-llm: positions without a gradient are not in A either. Labels are the dataset's. `relative_damping` makes
  0.1 a factor of the mean: of the grid for EK-FAC, of each side's eigenvalues for K-FAC, which is *factored* damping.
* Scores are ⟨G_q, H⁻¹ G_n⟩ of both *losses* in all of them: positive where training on n lowers the loss of q.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

clock = time.process_time  # of one thread: its own seconds, whatever else the machine does
TOKENS = 1024  # in a batch
DAMPING = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    train: list[list[int]]
    queries: list[list[int]]

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps({"model": self.model, "train": self.train, "queries": self.queries}), "utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> "Case":
        return cls(**json.loads(path.read_text("utf-8")))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.train))

    def opened(self, dtype: torch.dtype = torch.float32) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()


Result = dict[str, Any]  # "scores": [queries][documents]; "seconds": {step: CPU seconds}


# --- bergson ---------------------------------------------------------------------------------------------------------


def bergson_config(case: Case, work: Path, p: int, data: str, name: str, ranks: int = 1) -> Any:
    from bergson.config import DataConfig, DistributedConfig, IndexConfig

    return IndexConfig(
        run_path=str(work / name), overwrite=True, model=case.model, projection_dim=p, token_batch_size=TOKENS,
        data=DataConfig(dataset=str(work / data)), distributed=DistributedConfig(nproc_per_node=ranks),
    )  # fmt: skip


def bergson_name(method: str, p: int, labels: str, ranks: int) -> str:
    return f"bergson-{method}-{p}-{labels}-{ranks}"


def bergson_data(case: Case, work: Path) -> None:
    from datasets import Dataset

    for name, documents in (("train", case.train), ("queries", case.queries)):
        if not (work / name).exists():
            Dataset.from_dict({"input_ids": documents}).save_to_disk(str(work / name))


def bergson_scores(
    case: Case, work: Path, *, method: str, p: int = 0, labels: str = "data", ranks: int = 1, resume: bool = False
) -> Result:
    """Return scores of its pipeline: query gradients, factors, inverse applied to the queries, training scored.

    Args:
        method: kfac, ekfac, tkfac or shampoo.
        p: rows and columns of a projected gradient; 0 keeps them whole. It refuses ekfac with a projection.
        labels: data or sampled; sampled ones are drawn anew by every run.
        ranks: gloo processes; with more than one the seconds are those of this process alone, which waits.
        resume: use what is in the folder of that name.
    """
    from bergson.config import HessianConfig, HessianPipelineConfig, PreprocessConfig, QuerySetConfig, ScoreConfig
    from bergson.data import load_scores
    from bergson.hessians.pipeline import hessian_pipeline

    bergson_data(case, work)
    index = bergson_config(case, work, p, "train", bergson_name(method, p, labels, ranks), ranks)
    if not resume:
        shutil.rmtree(index.run_path, ignore_errors=True)
    factors = HessianConfig(
        method="kfac" if method == "ekfac" else method, ev_correction=method == "ekfac",
        use_dataset_labels=labels == "data",
    )  # fmt: skip
    query = QuerySetConfig(dataset=str(work / "queries"), aggregation="none")
    pipeline = HessianPipelineConfig(query=query, resume=resume)
    pipeline.inversion_cfg.damping_factor = DAMPING
    began = clock()
    hessian_pipeline(index, factors, ScoreConfig(), PreprocessConfig(), pipeline)
    seconds = {"pipeline": clock() - began}
    found = np.asarray(load_scores(Path(index.run_path) / "scores")[:]).astype(np.float64)
    return {"scores": found.reshape(len(case.train), -1).T.tolist(), "seconds": seconds}


def bergson_sketches(case: Case, work: Path, *, dimensions: Sequence[int], labels: str = "data") -> Result:
    """Return scores of K-FAC, whole and then at each p, from the same factors: with sampled labels, of the same draw.

    Its pipeline fits them again for every p; a folder with factors and query gradients from before lets it go on.
    """
    found = bergson_scores(case, work, method="kfac", labels=labels)
    scores, seconds = {"0": found["scores"]}, {"0": found["seconds"]["pipeline"]}
    for p in dimensions:
        folder = work / bergson_name("kfac", p, labels, 1)
        folder.mkdir()
        for made in ("query", "hessian"):
            (folder / made).symlink_to(work / bergson_name("kfac", 0, labels, 1) / made)
        found = bergson_scores(case, work, method="kfac", p=p, labels=labels, resume=True)
        scores[str(p)], seconds[str(p)] = found["scores"], found["seconds"]["pipeline"]
    return {"scores": scores, "seconds": seconds}


def bergson_fit(case: Case, work: Path, *, method: str, labels: str = "data") -> Callable[[], None]:
    """Return a function that fits its factors (both passes for ekfac, and the eigendecompositions) and writes them."""
    from bergson.config import HessianConfig
    from bergson.hessians.hessian_approximations import hessian_worker
    from bergson.utils.worker_utils import setup_data_pipeline

    bergson_data(case, work)
    index = bergson_config(case, work, 0, "train", f"bergson-fit-{method}")
    factors = HessianConfig(
        method="kfac" if method == "ekfac" else method, ev_correction=method == "ekfac",
        use_dataset_labels=labels == "data",
    )  # fmt: skip
    dataset, _ = setup_data_pipeline(index)

    def run() -> None:
        shutil.rmtree(index.partial_run_path, ignore_errors=True)
        index.partial_run_path.mkdir(parents=True)
        hessian_worker(0, 0, 1, index, factors, dataset)

    return run


def bergson_collection(case: Case, work: Path, *, p: int) -> Callable[[], None]:
    """Return a function that writes its index of all training documents. The model is loaded before, once."""
    from bergson.collection import collect_gradients
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import create_processor, setup_data_pipeline, setup_model_and_peft

    bergson_data(case, work)
    index = bergson_config(case, work, p, "train", f"bergson-index-{p}")
    dataset, _ = setup_data_pipeline(index)
    model, targets = setup_model_and_peft(index)
    batches = allocate_batches(dataset["length"][:], index.token_batch_size)

    def run() -> None:
        shutil.rmtree(index.partial_run_path, ignore_errors=True)
        index.partial_run_path.mkdir(parents=True)
        processor = create_processor(model, index, targets)
        collect_gradients(model, dataset, processor, index, batches=batches, target_modules=targets)

    return run


# --- kronfluence -----------------------------------------------------------------------------------------------------


def kronfluence_task(modules: list[str]) -> Any:
    from kronfluence.task import Task

    class LanguageModelling(Task):
        """As in its own example for language models, but for the last position: see above."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
            logits = logits.reshape(-1, logits.shape[-1])
            labels = batch["input_ids"][:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: Any) -> Tensor:
            mask = torch.ones_like(batch["input_ids"])
            mask[:, -1] = 0
            return mask

    return LanguageModelling()


def linears(model: nn.Module) -> list[str]:
    """Return the linears of the blocks: all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head]


def kronfluence_analyzer(case: Case, work: Path) -> tuple[Any, Any, Any, int]:
    """Return its analyzer, both data sets, and how many documents are in a batch. Documents have one length."""
    from datasets import Dataset
    from kronfluence.analyzer import Analyzer, prepare_model

    model = case.opened()
    task = kronfluence_task(linears(model))
    model = prepare_model(model=model, task=task)
    analyzer = Analyzer(
        analysis_name="case", model=model, task=task, cpu=True, disable_tqdm=True, output_dir=str(work / "kronfluence")
    )
    train, queries = (Dataset.from_dict({"input_ids": one}).with_format("torch") for one in (case.train, case.queries))
    return analyzer, train, queries, max(1, TOKENS // len(case.train[0]))


def kronfluence_scores(case: Case, work: Path, *, method: str, labels: str = "data") -> Result:
    """Return its pairwise scores, and the seconds of fitting the factors and of scoring.

    Args:
        method: identity, diagonal, kfac or ekfac.
    """
    from kronfluence.arguments import ScoreArguments

    analyzer, train, queries, batch = kronfluence_analyzer(case, work)
    fit = kronfluence_fit(case, work, method=method, labels=labels, made=(analyzer, train, batch))
    began = clock()
    fit()
    fitted = clock()
    analyzer.compute_pairwise_scores(
        scores_name=method, factors_name=method, query_dataset=queries, train_dataset=train,
        per_device_query_batch_size=len(case.queries), per_device_train_batch_size=batch,
        score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
    )  # fmt: skip
    seconds = {"fit": fitted - began, "score": clock() - fitted}
    found = analyzer.load_pairwise_scores(method)["all_modules"].double()
    return {"scores": found.tolist(), "seconds": seconds}


def kronfluence_fit(
    case: Case, work: Path, *, method: str, labels: str = "data", made: Any = None
) -> Callable[[], None]:
    """Return a function that fits its factors and writes them."""
    from kronfluence.arguments import FactorArguments

    if made is None:
        analyzer, train, _, batch = kronfluence_analyzer(case, work)
    else:
        analyzer, train, batch = made
    arguments = FactorArguments(strategy=method, use_empirical_fisher=labels == "data")

    def run() -> None:
        analyzer.fit_all_factors(
            factors_name=method, dataset=train, per_device_batch_size=batch, factor_args=arguments,
            overwrite_output_dir=True,
        )  # fmt: skip

    return run


# --- dattri-llm ------------------------------------------------------------------------------------------------------


def dattri_scores(case: Case, work: Path, *, method: str) -> Result:
    """Return its scores; the labels are those of the dataset.

    Args:
        method: kfac or ekfac.
    """
    from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig, KFACAttributor
    from dattri_llm.utils.hashing import hash_sample

    model = case.opened()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["input_ids"][:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    kind = {"kfac": KFACAttributor, "ekfac": EKFACAttributor}[method]
    batch = max(1, TOKENS // len(case.train[0]))
    arguments = AttributionArguments(output_dir=str(work / "dattri"), per_device_train_batch_size=batch)
    attributor = kind(arguments, task=AttributionTask(loss, model))
    sets = [[{"input_ids": torch.tensor(ids)} for ids in one] for one in (case.train, case.queries)]
    began = clock()
    found = attributor.attribute(
        *sets, damping=DAMPING, relative_damping=True, hook_config=HookManagerConfig(linear_io=linears(model))
    )
    seconds = {"all": clock() - began}
    ids, matrix = found.agnostic_matrix()
    rows = [ids.index(hash_sample(one)) for one in sets[0]]
    columns = [found.test_index[hash_sample(one)] for one in sets[1]]
    return {"scores": matrix[rows][:, columns].T.double().tolist(), "seconds": seconds}


# --- what both are compared with -------------------------------------------------------------------------------------


def forward_backward(case: Case) -> Callable[[], None]:
    """Return a function that runs the model forward and backward on the same batches, without gradients of weights."""
    model = case.opened().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # so that the backward pass goes through every block
    size = max(1, TOKENS // max(map(len, case.train)))
    batches = [torch.tensor(case.train[i : i + size]) for i in range(0, len(case.train), size)]

    def run() -> None:
        for ids in batches:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            model.zero_grad()

    return run


def alternating(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of every side, round after round, after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for number in range(-1, rounds):
        for name in order:
            began = clock()
            sides[name]()
            if number >= 0:
                found[name].append(clock() - began)
        order.reverse()
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Their progress goes to the error stream, so that the last line of output is the answer."""
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):
        yield
