"""Words that a reader from another country stumbles over stay out of the source and the docs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for pattern in ("src/treering/**/*.py", "src/treering/**/*.md", "src/treering/**/*.yaml", "docs/*.md", "*.md")
    for path in ROOT.glob(pattern)
)
# Word -> what to write. Each had another meaning than the dictionary's first one, or is an idiom.
INSTEAD = {
    "beside": "next to, with, besides",
    "goes? on": "resume, continue",
    "to be had": "available",
    "as of": "from, since",
    "for ever": "without end",
    "let go of": "freed",
    "nothing to speak of": "hardly any",
    "dealt|hands out": "assigned, sharded",
    "travel(s|led|ling)?": "are sent",
    "keeper|teller|judge|pulse": "checkpoint manager, reporter, evaluator, heartbeat",
    "door|house|stranger|crumb": "parsing, package, unknown, small file",
    "room": "memory limit, capacity, space",
    "in company|keeps? company": "with",
}
PATTERN = re.compile(r"\b(" + "|".join(INSTEAD) + r")\b", re.IGNORECASE)
FORMER_NAMES = re.compile(r"formerly|FORMERLY|was called|are now|is now")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_words(path):
    wrong = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        wrong += [f"line {number}: {match[0]!r}" for match in PATTERN.finditer(line) if not FORMER_NAMES.search(line)]
    assert not wrong, f"{path.relative_to(ROOT)}: {'; '.join(wrong)}. Write instead one of {INSTEAD}"
