"""A whole life of a small model, from text that comes with Python: `treering demo`."""

import shutil
import time
from pathlib import Path
from typing import Any

from treering.core.errors import TreeringError

MARK = ".treering-demo"  # only a folder that the demo made itself is ever cleared by it


def run(root: Path, console: Any, **sizes: Any) -> None:
    """Play all acts in `root`. `sizes` makes them smaller, for tests."""
    from treering.cli.config import load
    from treering.cli.measure import command as measure
    from treering.cli.train import job_of
    from treering.demo import acts, check, remember
    from treering.train.callbacks import Console
    from treering.train.export import export
    from treering.train.run import train

    _clear(root)
    began = time.monotonic()
    stage = acts.Stage(
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
                lambda s: check.check(s, job_of(load(root / "teach.yaml", None))),
            ),
            ("what does it still know", remember.remember),
        ],
        1,
    ):
        console.note(f"\nact {number} · {title}")
        act(stage)
    console.note(f"\nall of it in {time.monotonic() - began:.0f} s; what was made is in {root}")


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
