"""`treering demo`: pretrain, teach, export and compare a small model, with text that comes with Python."""

import shutil
import time
from pathlib import Path
from typing import Any

from treering.core.errors import TreeringError

MARK = ".treering-demo"  # the demo clears a folder only if it has created it


def run(root: Path, console: Any, **sizes: Any) -> None:
    """Run all acts in `root`. `sizes` are fields of `DemoStage` that make them smaller, for tests."""
    from treering.cli.config import load
    from treering.cli.measure import command as measure
    from treering.cli.train import job_of
    from treering.demo import acts
    from treering.demo.influence_act import clean_up
    from treering.demo.quantized_act import mend
    from treering.train.callbacks import Console
    from treering.train.export import export
    from treering.train.run import train

    _clear(root)
    start = time.monotonic()
    stage = acts.DemoStage(
        root=root,
        note=console.note,
        train=lambda file: train(job_of(load(file, None)), [Console(console)]),
        export=lambda run, to: export(job_of(load(run / "config.yaml", None)), to),
        measure=lambda model, to, data: measure(model, to, data, max_length=256),
        table=console.table,
        **sizes,
    )
    for number, (title, act) in enumerate(
        [
            ("collect text that comes with Python, train a tokenizer", acts.collect),
            ("pretrain a small model on it", acts.pretrain),
            ("teach it facts that nobody has ever known", acts.teach),
            (
                "load the export with plain transformers",
                lambda s: acts.check(s, job_of(load(root / "teach.yaml", None))),
            ),
            ("what does it still know", acts.remember),
            (
                "a mixture of experts in 4 bits, distilled back",
                lambda s: mend(s, lambda file: job_of(load(file, None))),
            ),
            (
                "which records taught a wrong answer, and what it is without them",
                lambda s: clean_up(s, lambda file: job_of(load(file, None))),
            ),
        ],
        1,
    ):
        console.note(f"\nact {number} · {title}")
        act(stage)
    console.note(f"\nall of it in {time.monotonic() - start:.0f} s; what was made is in {root}")


def _clear(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise TreeringError(f"{root} is a file; choose another folder with --folder")
    if root.exists() and any(root.iterdir()):
        if not (root / MARK).exists():
            raise TreeringError(f"{root} is not empty and not the demo's; choose another with --folder")
        shutil.rmtree(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / MARK).write_text("made by `treering demo`; the next one clears this folder\n", encoding="utf-8")
    except OSError as error:
        raise TreeringError(f"{root} cannot be written: {error.strerror}; choose another with --folder") from None
