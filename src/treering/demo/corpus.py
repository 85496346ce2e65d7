"""Text that every Python brings along: reference topics, standard-library sources and their docstrings."""

import json
import sysconfig
from pathlib import Path

from treering.core.seeds import derive

HELD_OUT = 25  # one document in so many is never trained on
PIECE = 4000  # characters: a document the size of a screen or two


def collect(folder: Path, characters: int) -> dict[str, int]:
    """Write train.jsonl and held_out.jsonl of about `characters` characters together. The same for the same Python."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces()
    pieces.sort(key=lambda piece: derive(0, "corpus", piece))  # by content: no file order, no hash seed
    counts = {"train": 0, "held_out": 0}
    with (folder / "train.jsonl").open("w") as train, (folder / "held_out.jsonl").open("w") as held_out:
        taken = 0
        for i, piece in enumerate(pieces):
            name, file = ("held_out", held_out) if i % HELD_OUT == 0 else ("train", train)
            file.write(json.dumps({"text": piece}) + "\n")
            counts[name] += 1
            taken += len(piece)
            if taken >= characters:
                break
    return counts


def _pieces() -> list[str]:
    from pydoc_data.topics import topics

    texts = list(topics.values())
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json",
                    "logging", "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree"):  # fmt: skip
        for path in sorted((library / package).glob("*.py")):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
    # Of one text at most a few pieces, so that no single large file becomes the corpus.
    return [
        text[i : i + PIECE] for text in texts for i in range(0, min(len(text), 12 * PIECE), PIECE) if text[i:].strip()
    ]


def texts(path: Path) -> list[str]:
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]
