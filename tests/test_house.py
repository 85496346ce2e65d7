"""The rules of the house, read from the syntax of its files: who may import whom, how large a room may be."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "treering"
FILES = sorted(SOURCE.rglob("*.py"))

GROUND = {
    "technique",
    "errors",
    "exactly",
    "forwards",
    "seeds",
    "together",
    "anatomy",
    "folders",
    "writing",
    "weights",
    "topology",
    "trust",
}
FIRST = {"attention", "formats", "curvature"}
TECHNIQUES = {"full", "lora", "osft", "tiling", "recompute", "shard", "compile"}
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(FIRST | TECHNIQUES | {"plan"}, GROUND | FIRST),
    "data": GROUND | {"attention"},
    "train": GROUND | FIRST | {"plan", "data"},
}
EVERYTHING = {"cli", "demo", "__init__", "__main__"}
NO_TORCH = [
    "treering",
    "treering.technique",
    "treering.errors",
    "treering.seeds",
    "treering.anatomy",
    "treering.cli.schema",
]
NO_TORCH += [
    "treering.lora",
    "treering.osft",
    "treering.tiling",
    "treering.recompute",
    "treering.full",
    "treering.shard",
    "treering.compile",
    "treering.train.config",
    "treering.data.config",
]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every room of ours that a file imports, at its top, inside functions, and for type checkers alike."""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno}: a relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "treering" else node.module for alias in node.names
            ]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "treering" and rest:
                yield rest.split(".")[0], node.lineno


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_room_imports_only_the_floors_below_it(path):
    mine = room(path)
    if mine in EVERYTHING:
        return
    assert mine in MAY_IMPORT, f"{mine} has no place in the house: say here what it may import"
    wrong = [
        f"{shown(path)}:{line} imports {other}"
        for other, line in rooms_imported(path)
        if other != mine and other not in MAY_IMPORT[mine]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_relative_or_forbidden_import_would_be_seen(tmp_path, monkeypatch):
    (tmp_path / "plan").mkdir()
    bad = tmp_path / "plan" / "bad.py"
    lines = ["from treering.lora.start import splitter", "import treering.cli", "from treering import full"]
    bad.write_text("def f():\n" + "".join(f"    {line}\n" for line in lines))
    assert sorted(found for found, _ in rooms_imported(bad)) == ["cli", "full", "lora"]


def test_settings_and_contract_leave_torch_alone():
    code = f"import sys\nfor name in {NO_TORCH!r}:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE.parent)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(name, function, whether somebody outside may call it)."""

    def walk(node: ast.AST, prefix: str, public: bool) -> Iterator:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                open_to_all = public and (not child.name.startswith("_") or child.name == "__init__")
                yield f"{prefix}{child.name}", child, open_to_all
                yield from walk(child, f"{prefix}{child.name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.", public and not child.name.startswith("_"))
            else:
                yield from walk(child, prefix, public)

    yield from walk(tree(path), "", True)


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_rooms_are_small():
    lines = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: n for name, n in lines.items() if n > 500}
    assert statistics.median(lines.values()) <= 200
    sizes = {f"{shown(p)}:{name}": length(node) for p in FILES for name, node, _ in functions(p)}
    assert not {name: n for name, n in sizes.items() if n > 90}
    long = {name: n for name, n in sizes.items() if n > 50}
    assert len(long) < 0.06 * len(sizes), long


def test_public_functions_say_what_they_take_and_give():
    bare = []
    for path in FILES:
        for name, node, public in functions(path):
            if not public:
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if missing or (node.returns is None and node.name != "__init__"):
                bare.append(f"{shown(path)}:{node.lineno} {name}: {', '.join(missing) or 'what it returns'}")
    assert not bare, "\n".join(bare)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_nothing_is_unpickled_printed_or_run_from_a_file(path):
    banned = {"torch.load", "eval", "exec", "os.system", "pickle.load", "pickle.loads"}
    if room(path) not in ("cli", "demo"):
        banned.add("print")
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and called(node) in banned:
            found.append(f"{node.lineno}: {called(node)}(")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [
                f"{node.lineno}: {n}" for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")
            ]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{node.value.lineno}: trust_remote_code")
    assert not found, f"{shown(path)} {found}"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_every_file_begins_by_saying_what_it_is(path):
    if path.name == "__init__.py" and len(path.read_text().splitlines()) <= 10:
        return
    assert ast.get_docstring(tree(path)), f"{shown(path)} has no docstring"


def test_tests_are_not_much_shorter_than_the_source():
    count = lambda folder: sum(len(p.read_text(encoding="utf-8").splitlines()) for p in folder.rglob("*.py"))  # noqa: E731
    assert count(ROOT / "tests") >= 0.6 * count(SOURCE)


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_every_technique_is_laid_out_like_the_others(name):
    assert (SOURCE / name / "config.py").is_file() and (SOURCE / name / "README.md").is_file()
    text = (SOURCE / name / "README.md").read_text(encoding="utf-8")
    title = {"lora": "LoRA", "osft": "OSFT"}.get(name, name.capitalize())
    assert text.startswith(f"# {title}: ")
    assert "Limits" in text and "```" in text, "formula, limits and how to use it belong there"
