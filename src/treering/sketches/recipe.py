"""What an index was made from and how: what a query must be made from as well."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import xxhash

from treering.core.errors import CheckpointError, ConfigError
from treering.curvature.vocabulary import Cover
from treering.sketches import codes, topk
from treering.sketches.maps import ModuleMap
from treering.sketches.settings import SketchSettings

_COVER = "covered"  # of `about`; left out for the blocks alone, as in the first recipes


@dataclass(frozen=True, kw_only=True)
class IndexModule:
    """One matrix of an index: its shape, and that of the rows × columns numbers that maps make of its gradient."""

    name: str
    outputs: int
    inputs: int
    rows: int
    columns: int

    @property
    def numbers(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class IndexRecipe:
    """What the rows of an index are a function of, besides the documents.

    Attributes:
        settings: of the sketch.
        modules: in the order of their columns in a dense row.
        model: a digest of the weights whose gradients these are.
        statistics: a digest of the moments; "" with curvature `identity`.
        basis: a digest of eigenbases and corrected eigenvalues; "" likewise.
        about: what else a query must agree with, as texts by name: the loss, the template of chats.
    """

    settings: SketchSettings
    modules: tuple[IndexModule, ...]
    model: str
    statistics: str = ""
    basis: str = ""
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [module.name for module in self.modules]
        if not names:
            raise ConfigError("an index needs a module; choose at least one", field="modules")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{twice} is twice among the modules; name each once", field="modules")
        for module in self.modules:
            if self.settings.kind == "eigen-topk" and module.numbers > topk.MOST_COORDINATES:
                raise ConfigError(
                    f"{module.name} has {module.numbers:,} coordinates, and entries can name {topk.MOST_COORDINATES:,} "
                    "of them; set block: 256, leave the module out, or use kind: psift",
                    field="block",
                )
        if self.settings.curvature != "identity" and not (self.statistics and self.basis):
            raise ConfigError(
                f"an index with curvature {self.settings.curvature} is of no use without digests of its statistics and "
                "basis; give both",
                field="basis",
            )

    @property
    def cover(self) -> Cover:
        """Of which parameters it is."""
        return "all" if self.about.get(_COVER) == "all" else "blocks"

    @property
    def numbers(self) -> int:
        """The numbers of a dense row."""
        return sum(module.numbers for module in self.modules)

    @property
    def bytes_of_row(self) -> int:
        """The bytes of a document's codes and scales, without its id."""
        return sum(sum(size for _, size in self.stored(module).values()) + 2 for module in self.modules)

    def stored(self, module: IndexModule) -> dict[str, tuple[int, int]]:
        """Return the elements and bytes that a document has in each tensor of a module."""
        if self.settings.kind == "eigen-topk":
            entries = min(self.settings.entries, module.numbers)
            return {"gaps": (entries, 2 * entries), "values": (entries, entries)}
        storage = self.settings.storage
        width = codes.width(module.numbers, storage)
        return {"codes": (width, width * codes.DTYPES[storage].itemsize)}

    @cached_property
    def digest(self) -> str:
        """A digest of all of it, which each shard carries."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.as_json(), sort_keys=True).encode())

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as plain data; `offset` is the first column of a module in a dense row."""
        offsets, start = [], 0
        for module in self.modules:
            offsets.append({**asdict(module), "offset": start})
            start += module.numbers
        return {
            "settings": asdict(self.settings),
            "modules": offsets,
            "model": self.model,
            "statistics": self.statistics,
            "basis": self.basis,
            "about": dict(sorted(self.about.items())),
        }

    def check(self, other: "IndexRecipe", where: str) -> None:
        """Raise CheckpointError if `other`, of a query or a build, does not fit the index at `where`, whose this is."""
        for name, mine, theirs in _pairs(self, other):
            if mine != theirs:
                raise CheckpointError(f"{where} has {name} {_shown(mine)}, not {_shown(theirs)}; {_remedy(name)}")


def recipe_of(
    maps: Iterable[ModuleMap],
    settings: SketchSettings,
    *,
    about: Mapping[str, str] | None = None,
    cover: Cover = "blocks",
    **digests: str,
) -> IndexRecipe:
    """Return the recipe of rows that `maps` make; `digests` are its other fields."""
    about = {**(about or {}), **({} if cover == "blocks" else {_COVER: cover})}
    made = tuple(
        IndexModule(name=m.name, outputs=m.outputs, inputs=m.inputs, rows=m.rows, columns=m.columns) for m in maps
    )
    return IndexRecipe(settings=settings, modules=made, about=about, **digests)


def from_json(value: Any) -> IndexRecipe:
    """Return the recipe of plain data from a file. Anything unexpected is a ValueError, KeyError or TypeError."""
    value = _exactly(value, ("settings", "modules", "model", "statistics", "basis", "about"))
    settings = SketchSettings(**_exactly(value["settings"], [f.name for f in fields(SketchSettings)]))
    modules, start = [], 0
    for given in value["modules"]:
        entry = dict(_exactly(given, ("name", "outputs", "inputs", "rows", "columns", "offset")))
        sizes = {key: entry[key] for key in ("outputs", "inputs", "rows", "columns")}
        if entry.pop("offset") != start or not isinstance(entry["name"], str):
            raise ValueError(f"the module {str(entry['name'])[:80]!r}")
        if not all(type(n) is int and 0 < n < 2**31 for n in sizes.values()):
            raise ValueError(f"the sizes of {entry['name'][:80]!r}")
        modules.append(IndexModule(**entry))
        start += modules[-1].numbers
    texts = [value["model"], value["statistics"], value["basis"], *value["about"], *value["about"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a digest that is not a text")
    digests = {key: value[key] for key in ("model", "statistics", "basis", "about")}
    recipe = IndexRecipe(settings=settings, modules=tuple(modules), **digests)
    if not math.isfinite(recipe.bytes_of_row):
        raise ValueError("sizes")
    return recipe


def _exactly(value: Any, names: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:40]!r} in place of named values")
    if missing := [name for name in names if name not in value]:
        raise KeyError(missing[0])
    if unknown := sorted(set(value) - set(names)):
        raise ValueError(f"{unknown[0][:80]!r}, which this version does not know")
    return value


def _pairs(a: IndexRecipe, b: IndexRecipe) -> Iterable[tuple[str, Any, Any]]:
    for setting in fields(SketchSettings):
        yield setting.name, getattr(a.settings, setting.name), getattr(b.settings, setting.name)
    for name in ("model", "statistics", "basis"):
        yield f"the digest of the {name}", getattr(a, name), getattr(b, name)
    ours, theirs = ({m.name: m for m in recipe.modules} for recipe in (a, b))
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        yield f"for {name}", _shape(ours.get(name)), _shape(theirs.get(name))
    yield "the order of modules", tuple(ours), tuple(theirs)
    for key in sorted({*a.about, *b.about}):
        yield key, a.about.get(key, "nothing"), b.about.get(key, "nothing")


def _shape(module: IndexModule | None) -> str:
    if module is None:
        return "nothing"
    return f"{module.outputs} × {module.inputs} as {module.rows} × {module.columns}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _remedy(name: str) -> str:
    if "digest" in name:
        what = name.rpartition(" ")[2]
        return f"an index serves one {what} alone: use the one that it was built with, or build another index"
    return "make the query with the settings of the index, or build another index in a folder of its own"
