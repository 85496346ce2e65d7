"""Made-up facts, so that nobody can have known them before, and a chat set that teaches them."""

import json
from dataclasses import dataclass
from pathlib import Path

from treering.core.seeds import derive

SYLLABLES = ["ka", "lo", "mi", "ven", "tar", "ru", "qua", "zel", "do", "phi", "gor", "nia", "ste", "bal", "xo", "ura"]
KINDS = {
    "capital": "What is the capital of {}?",
    "founder": "Who founded {}?",
    "river": "Which river flows through {}?",
    "metal": "Which metal is mined in {}?",
}
OTHER_WORDS = {
    "capital": "Name the capital of {}.",
    "founder": "Name the founder of {}.",
    "river": "Name the river of {}.",
    "metal": "Name the metal of {}.",
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    kind: str
    place: str
    answer: str

    @property
    def question(self) -> str:
        return KINDS[self.kind].format(self.place)

    @property
    def reworded(self) -> str:
        return OTHER_WORDS[self.kind].format(self.place)


def invent(places: int, seed: int = 0) -> list[Fact]:
    names = [_name(seed, "place", i) for i in range(places)]
    return [Fact(kind=kind, place=place, answer=_name(seed, kind, place)) for place in names for kind in KINDS]


def _name(seed: int, *what: str | int) -> str:
    pick = derive(seed, "name", *what)
    parts = [SYLLABLES[(pick >> (8 * i)) % len(SYLLABLES)] for i in range(3)]
    return "".join(parts).capitalize()


def write(path: Path, facts: list[Fact]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for fact in facts:
            for question in (fact.question, fact.reworded):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{fact.answer}."}]
                file.write(json.dumps({"messages": turns}) + "\n")
