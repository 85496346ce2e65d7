"""A checkpoint of two ranks, damaged in every way we could think of. Named by what was done to it.

`unseal` edits what the manifest says and seals it anew with the right sha256, as a bug or somebody with write access
could: then digests prove nothing, and the schema, the coverage and the files' own headers have to. A manifest that lies
without contradicting itself or them (two halves of a tensor exchanged) is beyond any check, as are edited weights.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

EVERY = 64 << 10  # bytes
FIRST, SECOND, MANIFEST = "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"
Damage = Callable[[Path], None]


def truncated(file: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / file, size)


def flipped(file: str, bit: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (folder / file).write_bytes(content)

    return damage


def cuts(folder: Path, random: Random) -> Iterator[tuple[str, Damage]]:
    """At every 64 KiB of every file, at its beginning, near its end, and at random places."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        places = {*range(0, size, EVERY), 1, 7, 8, size - 1, *(random.randrange(size) for _ in range(3))}
        for place in sorted(p for p in places if p < size):
            yield f"truncate {path.name} to {place} bytes", truncated(path.name, place)


def flips(folder: Path, random: Random, number: int) -> Iterator[tuple[str, Damage]]:
    """One bit: in the length of a safetensors header, in the header, in the data, in the manifest."""
    for file in (FIRST, SECOND):
        size = (folder / file).stat().st_size
        header = int.from_bytes((folder / file).read_bytes()[:8], "little")
        for what, start, stop in (("length", 0, 8), ("header", 8, 8 + header), ("data", 8 + header, size)):
            for _ in range(number):
                bit = random.randrange(start * 8, stop * 8)
                yield f"flip bit {bit} of {file} ({what})", flipped(file, bit)
        yield f"flip the last bit of {file}", flipped(file, size * 8 - 1)
    size = (folder / MANIFEST).stat().st_size
    for bit in (random.randrange(size * 8) for _ in range(4 * number)):
        yield f"flip bit {bit} of {MANIFEST}", flipped(MANIFEST, bit)


def swap(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def linked(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).rename(folder / "elsewhere")
        (folder / file).symlink_to(folder / "elsewhere")

    return damage


def folder_instead(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def files(older: Path) -> dict[str, Damage]:
    """Whole files in the wrong place. `older` is an older checkpoint of the same run."""

    def copy(source: str, target: str, base: Path | None = None) -> Damage:
        def damage(folder: Path) -> None:
            shutil.copyfile((base or folder) / source, folder / target)

        return damage

    def stale(folder: Path) -> None:
        for path in older.iterdir():
            shutil.copyfile(path, folder / path.name)

    return {
        "swap the two ranks' files": swap,
        "second file is a copy of the first": copy(FIRST, SECOND),
        "first file is a copy of the second": copy(SECOND, FIRST),
        **{f"{name} is missing": lambda folder, name=name: (folder / name).unlink() for name in _NAMES},
        **{f"{name} is empty": truncated(name, 0) for name in _NAMES},
        **{f"{name} is of an older step": copy(name, name, older) for name in _NAMES},
        **{f"{name} is a folder": folder_instead(name) for name in _NAMES},
        **{f"{name} is longer than it was": _longer(name) for name in _NAMES[:2]},
        **{f"{name} is a symlink": linked(name) for name in _NAMES[:2]},
        "all files are of an older step": stale,
        "manifest is the first rank's file": copy(FIRST, MANIFEST),
        "manifest is deeply nested": lambda folder: _put(folder, b"[" * 200_000),
        "manifest is not UTF-8": lambda folder: _put(folder, b'{"sha256": "\xff"}'),
        "manifest is a number": lambda folder: _put(folder, b"1e999"),
        "manifest is null": lambda folder: _put(folder, b"null"),
        "manifest's content is no text": lambda folder: _put(folder, b'{"sha256": "", "content": 3}'),
        "manifest is a pickle": lambda folder: _put(folder, b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."),
    }


_NAMES = (FIRST, SECOND, MANIFEST)


def _longer(name: str) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"\0" * 16)

    return damage


def _put(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)


def unseal(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads(json.loads((folder / MANIFEST).read_bytes())["content"])
        edit(content)
        body = json.dumps(content)
        sealed = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "content": body}
        _put(folder, json.dumps(sealed).encode())

    return damage


def sealed_lies(tensor: str) -> Mapping[str, Damage]:
    """`tensor` has two dimensions and rows in both files."""

    def about(content: dict[str, Any]) -> dict[str, Any]:
        return content["tensors"][tensor]

    def chunk(index: int, **changes: Any) -> Damage:
        return unseal(lambda content: about(content)["chunks"][index].update(changes))

    def chunks(change: Callable[[list[Any]], Any]) -> Damage:
        return unseal(lambda content: change(about(content)["chunks"]))

    def tensor_is(**changes: Any) -> Damage:
        return unseal(lambda content: about(content).update(changes))

    def file(**changes: Any) -> Damage:
        return unseal(lambda content: content["files"][FIRST].update(changes))

    def renamed(name: str) -> Damage:
        def edit(content: dict[str, Any]) -> None:
            content["files"][name] = content["files"].pop(FIRST)
            for entry in content["tensors"].values():
                for one in entry["chunks"]:
                    one["file"] = name if one["file"] == FIRST else one["file"]

        return unseal(edit)

    paths = ("../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:x", "x\0y", "x\ny", "\u202ex", "no", "x" * 400)
    return {
        **{f"a file is called {name[:20]!r}": renamed(name) for name in paths},
        "a file's name is a number": chunk(0, file=3),
        "rows overlap": chunk(1, start=0),
        "rows overlap by one": unseal(lambda c: about(c)["chunks"][0].update(stop=about(c)["chunks"][0]["stop"] + 1)),
        "rows are missing between": unseal(
            lambda c: about(c)["chunks"][1].update(start=about(c)["chunks"][1]["start"] + 1)
        ),
        "rows begin below 0": chunk(0, start=-1),
        "rows end behind the last": chunk(1, stop=1 << 40),
        "rows are a fraction": chunk(0, start=0.0),
        "rows are true": chunk(0, start=False),
        "a chunk is missing": chunks(lambda found: found.pop()),
        "no chunk is left": chunks(lambda found: found.clear()),
        "a chunk is there twice": chunks(lambda found: found.append(found[0])),
        "a chunk is said to be in the other file": chunk(0, file=SECOND),
        "a tensor is missing": unseal(lambda content: content["tensors"].pop(tensor)),
        "all tensors are missing": unseal(lambda content: content["tensors"].clear()),
        "a tensor has another name": unseal(
            lambda content: content["tensors"].update({f"{tensor}x": content["tensors"].pop(tensor)})
        ),
        "a tensor has another dtype of its size": tensor_is(dtype="int32"),
        "a tensor has another dtype": tensor_is(dtype="float64"),
        "a tensor has a dtype that is code": tensor_is(dtype="load"),
        "a tensor has its rows and columns swapped": unseal(lambda c: about(c)["shape"].reverse()),
        "a tensor has more columns": unseal(lambda c: about(c)["shape"].__setitem__(1, 1 << 30)),
        "a tensor has more rows than memory": tensor_is(shape=[1 << 61, 1 << 61]),
        "a tensor has a negative size": tensor_is(shape=[-1, -1]),
        "a tensor has 10,000 dimensions": tensor_is(shape=[1] * 10_000),
        "a tensor is a list": unseal(lambda content: content["tensors"].update({tensor: []})),
        "the tensors are a list": unseal(lambda content: content.update(tensors=[])),
        "the files are a text": unseal(lambda content: content.update(files="x")),
        "a file has another size": file(bytes=8),
        "a file has a negative size": file(bytes=-1),
        "a file has no digests": file(blocks=""),
        "a file has fewer digests": unseal(
            lambda c: c["files"][FIRST].update(blocks=c["files"][FIRST]["blocks"][:-16])
        ),
        "a file has more digests": unseal(lambda c: c["files"][FIRST].update(blocks=c["files"][FIRST]["blocks"] * 2)),
        "a file's digests are a number": file(blocks=1),
        "a file is not listed": unseal(lambda content: content["files"].pop(SECOND)),
        "a file that does not exist is listed": unseal(
            lambda content: content["files"].update({"rank-00002.safetensors": content["files"][FIRST]})
        ),
        "the step is another": unseal(lambda content: content.update(step=content["step"] + 1)),
        "the step is negative": unseal(lambda content: content.update(step=-1)),
        "the step is a text": unseal(lambda content: content.update(step="2")),
        "the format is of tomorrow": unseal(lambda content: content.update(format=1000)),
        "there is no format": unseal(lambda content: content.pop("format")),
        "no rank has written it": unseal(lambda content: content.update(world=0)),
        "the facts are a number": unseal(lambda content: content.update(facts=1)),
        "there are no facts": unseal(lambda content: content.pop("facts")),
    }
