"""The library as a program of its own: it composes and trains where a package of the command line is not installed.

    python -m tests.library_alone pydantic rich typer …

The packages that are named are hidden: for `import` and for `importlib.util.find_spec` alike they are not installed.
What transformers itself imports (huggingface_hub reads model cards with yaml) is hidden as soon as it has done so.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

NEEDED_BY_TRANSFORMERS = {"yaml"}


class Hiding:
    """A finder of modules that answers as `finder` does, but finds nothing of the hidden packages."""

    def __init__(self, finder: Any, hidden: frozenset[str]):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(packages: set[str]) -> None:
    """Make `packages` impossible to import in this process from now on."""
    sys.meta_path[:] = [Hiding(finder, frozenset(packages)) for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def train_each(folder: Path) -> None:
    """Compose every technique of the library on the model in `folder`, take one step, and export the result."""
    import torch

    import treering as tr
    from tests.toy import rows, train

    cases = {
        "full": [tr.Full()],
        "lora": [tr.LoRA(rank=2)],
        "osft": [tr.OSFT(protect="weights", ratio=0.5)],
        "tiling": [tr.Full(), tr.TiledMLP(tile=5), tr.TiledLoss(tile=5)],
        "tiled blocks": [tr.LoRA(rank=2), tr.TiledBlock(tile=5)],
        "recompute": [tr.Full(), tr.Recompute(offload="cpu")],
        "shard": [tr.Full(), tr.Shard()],
        "together": [tr.OSFT(protect="weights", ratio=0.5), tr.TiledLoss(tile=5), tr.Recompute(), tr.Shard()],
    }
    for name, techniques in cases.items():
        run = tr.compose(str(folder), techniques, dtype="float32")
        run.explain()
        before = {key: value.clone() for key, value in run.plain()}
        train(run, [rows(2)])
        after = dict(run.plain())
        assert all(torch.isfinite(value).all() for value in after.values()), name
        assert any(not torch.equal(before[key], value) for key, value in after.items()), name
        run.export(folder.with_name(name))
        print(name)


def train_attached(folder: Path) -> None:
    """Train in somebody's own loop, with an optimizer of their own."""
    import torch

    import treering as tr

    run = tr.compose(str(folder), [tr.OSFT(protect="weights", ratio=0.5)], dtype="float32")
    optimizer = torch.optim.AdamW([p for _, p in run.trainable()], lr=1e-2, weight_decay=0)
    detach = run.attach(optimizer)
    ids = torch.randint(3, 128, (2, 12), device=run.plan.device)
    run.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    detach()
    print("attach")


def measure(folder: Path) -> None:
    """Take the second moments of a model that nothing was done to."""
    from transformers import AutoModelForCausalLM

    import treering as tr
    from tests.toy import rows

    found = tr.measure(AutoModelForCausalLM.from_pretrained(folder), rows(2))
    assert len(found) > 0
    print("measure")


def main(packages: set[str]) -> None:
    hide(packages - NEEDED_BY_TRANSFORMERS)
    from transformers import LlamaConfig, LlamaForCausalLM

    hide(packages & NEEDED_BY_TRANSFORMERS)

    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
        train_each(folder)
        train_attached(folder)
        measure(folder)


if __name__ == "__main__":
    main(set(sys.argv[1:]))
