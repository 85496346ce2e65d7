"""Text that a model generates itself, sampled at temperature 1: what it knows, where its old data is not available."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from treering.core.collectives import gather_objects
from treering.core.errors import DataError
from treering.core.seeds import generator
from treering.core.topology import data_rank
from treering.data.examples import Document
from treering.plan import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK = 16  # steps between two looks at whether every document has ended


@torch.no_grad()
def generated(
    run: Run,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    at_once: int = 8,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Document]:
    """Return at least `tokens` tokens of documents of at most `length`, the same on every rank.

    Each document has a random stream by its number, so that the text does not depend on the number of ranks.
    """
    start, ends = marks(run, tokenizer)
    rank, ranks = data_rank(run.plan.mesh)
    at_once = min(at_once, max(1, -(-tokens // (length * ranks))))
    documents: dict[int, list[int]] = {}
    done, number = 0, 0
    run.model.eval()
    try:
        while done < tokens:
            rows = [number + rank * at_once + i for i in range(at_once)]
            written = dict(zip(rows, _written(run, rows, start, ends, length, seed)))
            documents |= {row: ids for part in gather_objects(written) for row, ids in part.items()}
            number += at_once * ranks
            done = sum(map(len, documents.values()))
            progress(min(done, tokens), tokens)
    finally:
        run.model.train()
    return [
        Document(ids=np.asarray(ids, np.uint32), mask=np.ones(len(ids), bool), sample_id=f"generated:{row}")
        for row, ids in sorted(documents.items())
    ]


def marks(run: Run, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, set[int]]:
    """Return the token that a document begins with, and those that end it."""
    settings = [getattr(run.model, "generation_config", None), run.model.config, tokenizer]
    begins: list[Any] = [getattr(one, "bos_token_id", None) for one in (tokenizer, run.model.config)]
    ends: set[int] = set()
    for one in settings:
        end: Any = getattr(one, "eos_token_id", None)
        ends |= set(end if isinstance(end, list) else [end]) - {None}
    begin = next((b for b in begins if isinstance(b, int)), min(ends, default=None))
    if begin is None:
        raise DataError(
            "the model has no token that begins or ends a text, so it cannot write any; give text: --data FILE"
        )
    return begin, ends


def _written(run: Run, rows: list[int], start: int, ends: Collection[int], length: int, seed: int) -> list[list[int]]:
    device = run.plan.device
    streams = [generator(seed, "generate", row) for row in rows]
    texts = [[start] for _ in rows]
    open_rows = set(range(len(rows)))
    ids = torch.full((len(rows), 1), start, device=device)
    cache: Any = None
    all_ids = ids
    for step in range(length - 1):
        if step % _LOOK == 0 and not _any(bool(open_rows), device):
            break
        inputs = (
            all_ids if cache is None else ids
        )  # some models have a cache of another kind: they read all of it again
        out = run.model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        sums = out.logits[:, -1].double().softmax(-1).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in streams]).to(device)
        ids = torch.searchsorted(sums, draws * sums[:, -1:]).clamp_max(sums.shape[1] - 1)
        all_ids = torch.cat([all_ids, ids], 1) if cache is None else all_ids
        for i, token in enumerate(ids[:, 0].tolist()):
            if i in open_rows:
                texts[i].append(token)
                if token in ends:
                    open_rows.discard(i)
    return texts


def _any(here: bool, device: torch.device) -> bool:
    """Whether any rank has still something to write: a sharded model needs all of them in each forward."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return here
    flag = torch.tensor([here], dtype=torch.uint8, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
