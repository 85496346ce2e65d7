"""Ground truth for influence on text: a small Llama retrained on halves of 192 documents, and the losses of 24 queries.

    python -m benchmarks.influence_text [--subsets 60] [--folder FOLDER]     makes it if it is not there, and prints it

Nothing is downloaded: tokenizer and base model read the top-level modules of Python's standard library; documents and
queries are 28 runs of eight consecutive chunks from asyncio, email, http and json. The first seven chunks of a run are
training documents, the eighth is a query, so that a query has related documents. Fine-tuning has no noise of its own:
first weights, order, batches and learning rates are those of the full run, and documents that a subset lacks are
missing from their batch. Retrainings are written down as they end: a second call continues, or only reads.
"""

import argparse
import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from treering.core import seeds

LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("asyncio", "email", "http", "json")


@dataclass(frozen=True, kw_only=True)
class Setting:
    seed: int = 0
    vocabulary: int = 1024
    width: int = 96
    inner: int = 256
    layers: int = 3
    heads: int = 4
    base_chunks: int = 6400
    base_length: int = 96
    base_batch: int = 32
    base_lr: float = 1e-3
    runs: int = 28
    chunks: int = 8
    length: int = 48
    documents: int = 192
    queries: int = 24
    epochs: int = 3
    batch: int = 16
    lr: float = 1e-3


STANDARD = Setting()
# Wider and briefly trained, with longer documents: what sketches and speed are measured on. It has no ground truth.
WIDE = Setting(
    width=256,
    inner=512,
    layers=2,
    base_chunks=3200,
    base_lr=3e-3,
    runs=25,
    chunks=9,
    length=66,
    documents=200,
    queries=8,
)


@dataclass(frozen=True, kw_only=True)
class TextTruth:
    """The model that was trained on all documents, and what became of the queries without some of them.

    Attributes:
        model: its folder, for `from_pretrained`; the tokenizer is in it.
        base: the folder of the model before fine-tuning.
        train, queries: tokens, [documents, length] and [queries, length].
        names, query_names: where in the standard library each of them is.
        subsets: whether a document was trained on, bool [subsets, documents]: a random half each.
        losses: mean loss per token of each query after training on the subset, [subsets, queries].
        before, full: the queries' losses of the base and of the fully trained model.
    """

    model: Path
    base: Path
    train: Tensor
    queries: Tensor
    names: list[str]
    query_names: list[str]
    subsets: NDArray[np.bool_]
    losses: NDArray[np.float64]
    before: NDArray[np.float64]
    full: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The model before fine-tuning, and the documents: [documents, length] and [queries, length]."""

    base: Path
    train: Tensor
    queries: Tensor
    names: list[str]
    query_names: list[str]


def cache() -> Path:
    """Return the user's folder for what benchmarks make once."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "treering-benchmarks"


def ground_truth(*, subsets: int = 60, folder: Path | None = None, setting: Setting = STANDARD) -> TextTruth:
    """Return the truth of a setting, made first if it is not in the folder: then it takes some minutes.

    Subset i is the same whatever `subsets` is; more of them are added to those that are there.
    """
    found = material(folder=folder, setting=setting)
    train, queries, root = found.train, found.queries, found.base.parent
    with one_thread():
        if not (root / "model").is_dir():
            tuned = _opened(found.base)
            finetune(tuned, train, np.ones(len(train), dtype=bool), setting, divisor=setting.batch)
            _save(tuned, _tokenizer(found.base), root / "model")
        chosen = np.stack([half(setting, number) for number in range(subsets)])
        path = root / "losses.safetensors"
        known = load_file(path)["losses"].numpy() if path.is_file() else np.zeros((0, len(queries)))
        model = _opened(found.base)
        first = {name: value.clone() for name, value in model.state_dict().items()}
        before, full = losses(model, queries), losses(_opened(root / "model"), queries)
        while len(known) < subsets:
            model.load_state_dict(first)
            finetune(model, train, chosen[len(known)], setting, divisor=setting.batch / 2)
            known = np.concatenate([known, losses(model, queries)[None]])
            _replace(path, known)
    return TextTruth(
        model=root / "model", base=found.base, train=train, queries=queries, names=found.names,
        query_names=found.query_names, subsets=chosen, losses=known[:subsets], before=before, full=full,
    )  # fmt: skip


def material(*, folder: Path | None = None, setting: Setting = STANDARD) -> Material:
    """Return base model, documents and queries of a setting, made first if they are not in the folder."""
    root = (folder or cache()) / f"influence-text-{_digest(setting)}"
    if not (root / "base").is_dir():
        with one_thread():
            _make(root, setting)
    texts = json.loads((root / "texts.json").read_text("utf-8"))
    train, queries = (torch.tensor(texts[name]) for name in ("train", "queries"))
    return Material(
        base=root / "base", train=train, queries=queries, names=texts["names"], query_names=texts["query_names"]
    )


def retrained(truth: TextTruth, kept: NDArray[np.bool_], *, setting: Setting = STANDARD) -> Any:
    """Return the model trained without the documents that are not `kept`, as the full run was: to leave few out."""
    with one_thread():
        model = _opened(truth.base)
        finetune(model, truth.train, kept, setting, divisor=setting.batch)
    return model


def half(setting: Setting, number: int) -> NDArray[np.bool_]:
    """Return the subset of this number: a random half of the documents."""
    random = np.random.default_rng(seeds.derive(setting.seed, "subset", number))
    return random.permutation(setting.documents) < setting.documents // 2


def finetune(model: Any, train: Tensor, kept: NDArray[np.bool_], setting: Setting, *, divisor: float) -> None:
    """Train on the kept documents, in the batches of the full run. The loss is Σ mean loss of a document / divisor."""
    # A document that is missing moves no other one to another batch or learning rate.
    steps = [torch.from_numpy(batch[kept[batch]]) for batch in batches(len(train), setting)]
    optimize(model, (train[step] for step in steps), len(steps), setting.lr, divisor)


def batches(documents: int, setting: Setting) -> list[NDArray[np.int64]]:
    """Return the documents of each step of the full run."""
    orders = [np.random.default_rng(seeds.derive(setting.seed, "epoch", e)) for e in range(setting.epochs)]
    return [one for order in orders for one in np.split(order.permutation(documents), documents // setting.batch)]


def optimize(model: Any, rows: Iterator[Tensor], steps: int, lr: float, divisor: float) -> None:
    """AdamW with a rate that falls linearly to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step, ids in enumerate(rows):
        if not len(ids):
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        (document_losses(model, ids).sum() / divisor).backward()
        optimizer.step()
    model.eval()


def document_losses(model: Any, ids: Tensor) -> Tensor:
    """Return the mean loss per predicted token of documents of equal length."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def losses(model: Any, ids: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        return document_losses(model, ids).double().numpy()


def texts(setting: Setting, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the chunks of the base, and documents and queries with their places."""
    random = np.random.default_rng(seeds.derive(setting.seed, "texts"))
    long = setting.base_length
    pieces = [_tokens(tokenizer, path) for path in sorted(LIBRARY.glob("*.py"))]
    chunks = np.concatenate([ids[: len(ids) // long * long].reshape(-1, long) for ids in pieces])
    base = chunks[random.permutation(len(chunks))[: setting.base_chunks]]
    one, width = setting.length, setting.length * setting.chunks
    paths = sorted(path for name in PACKAGES for path in (LIBRARY / name).rglob("*.py") if "test" not in path.parts)
    places = [
        (str(path.relative_to(LIBRARY)), start, ids[start : start + width])
        for path in paths
        for ids in [_tokens(tokenizer, path)]
        for start in range(0, len(ids) - width + 1, width)
    ]
    found: dict[str, Any] = {"train": [], "queries": [], "names": [], "query_names": []}
    for name, start, ids in (places[i] for i in random.permutation(len(places))[: setting.runs]):
        for number, chunk in enumerate(ids.reshape(setting.chunks, one).tolist()):
            last = number == setting.chunks - 1
            found["queries" if last else "train"].append(chunk)
            found["query_names" if last else "names"].append(f"{name}:{start + number * one}")
    for key in found:
        found[key] = found[key][: setting.queries if "quer" in key else setting.documents]
    return torch.from_numpy(base), found


def _make(root: Path, setting: Setting) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=setting.vocabulary, initial_alphabet=sorted(alphabet), show_progress=False)
    trained.train_from_iterator((_read(path) for path in sorted(LIBRARY.glob("*.py"))), bpe)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained)
    base, found = texts(setting, tokenizer)
    (root / "texts.json").write_text(json.dumps(found), "utf-8")
    config = LlamaConfig(
        vocab_size=setting.vocabulary, hidden_size=setting.width, intermediate_size=setting.inner,
        num_hidden_layers=setting.layers, num_attention_heads=setting.heads, num_key_value_heads=setting.heads,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(setting.seed, "weights"))
        model: Any = LlamaForCausalLM(config)
    steps = base.split(setting.base_batch)
    optimize(model, iter(steps), len(steps), setting.base_lr, setting.base_batch)
    _save(model, tokenizer, root / "base")


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def _replace(path: Path, known: NDArray[np.float64]) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file({"losses": torch.from_numpy(known)}, unfinished)
    unfinished.replace(path)


def _opened(folder: Path) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _tokens(tokenizer: Any, path: Path) -> NDArray[np.int64]:
    return np.array(tokenizer.backend_tokenizer.encode(_read(path)).ids, dtype=np.int64)


def _read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")


def _digest(setting: Setting) -> str:
    """Of what decides the truth: the setting, the texts and the version of torch."""
    code = hashlib.sha256(json.dumps(asdict(setting)).encode())
    code.update(torch.__version__.encode())
    for path in [
        *sorted(LIBRARY.glob("*.py")),
        *(p for name in PACKAGES for p in sorted((LIBRARY / name).rglob("*.py"))),
    ]:
        code.update(path.read_bytes())
    return code.hexdigest()[:12]


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of one thread: the same numbers on every machine of a kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="default: the user's cache")
    options = parser.parse_args()
    began = time.perf_counter()
    truth = ground_truth(subsets=options.subsets, folder=options.folder)
    seconds = time.perf_counter() - began
    print(f"{truth.model}: {len(truth.train)} documents, {len(truth.queries)} queries, {seconds:.0f} s")
    print(f"mean loss of the queries: {truth.before.mean():.3f} before, {truth.full.mean():.3f} trained on all,")
    print(f"{truth.losses.mean():.3f} on {options.subsets} halves, standard deviation {truth.losses.std(0).mean():.4f}")


if __name__ == "__main__":
    main()
