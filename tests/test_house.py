"""The rules of the code base, read from the syntax of its files: who may import whom, how large a file may be."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from treering.techniques import TECHNIQUES

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "treering"
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up: a package imports only what stands before it. plan, memory, data and train know techniques through
# the contract alone, and no technique imports another.
ORDER = ("core", "store", "anatomy", "objectives", "technique", "formats", "weights", "attention", "experts")
ORDER += (
    "curvature",
    "sketches",
    "techniques",
    "plan",
    "memory",
    "data",
    "train",
    "influence",
    "report",
    "cli",
    "demo",
)
FOLDERS = {cls.__module__.split(".")[2] for cls in TECHNIQUES.values()}
KNOW_THE_CONTRACT = {"plan", "memory", "data", "train"}
EVERYTHING = {"__init__", "__main__"}
NO_TORCH = [
    "treering",
    "treering.technique",
    "treering.core.errors",
    "treering.core.seeds",
    "treering.anatomy",
    "treering.objectives",
    "treering.cli.schema",
]
NO_TORCH += ["treering.techniques", "treering.train.config", "treering.data.config"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package(path: Path) -> str:
    """As in ORDER; a technique's is `techniques.lora`."""
    parts = [part.removesuffix(".py") for part in path.relative_to(SOURCE).parts]
    return ".".join(parts[:2]) if parts[0] == "techniques" and len(path.relative_to(SOURCE).parts) > 2 else parts[0]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of ours that a file imports, at its top, inside functions, and for type checkers alike."""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("treering."):
                yield name.removeprefix("treering."), node.lineno


def may_import(mine: str, other: str) -> bool:
    """`other` is a dotted name below treering."""
    top, _, rest = other.partition(".")
    technique = f"techniques.{rest.split('.')[0]}" if top == "techniques" else top
    if technique == mine or (mine == "techniques" and rest):  # the list of techniques
        return True
    if top not in ORDER:
        return other == "__version__"
    if top == "techniques" and (mine in KNOW_THE_CONTRACT or mine.startswith("techniques.")):
        return False
    return ORDER.index(top) < ORDER.index(mine.partition(".")[0])


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_package_imports_only_those_below_it(path):
    mine = package(path)
    if mine in EVERYTHING:
        return
    assert mine.partition(".")[0] in ORDER, f"{mine} has no place in ORDER: say there what it may import"
    wrong = [f"{shown(path)}:{line} imports {other}" for other, line in imported(path) if not may_import(mine, other)]
    assert not wrong, "\n".join(wrong)


def test_a_forbidden_import_would_be_seen():
    assert may_import("plan", "core.errors.PlanError") and may_import("techniques.lora", "techniques.lora.addend.a")
    assert not may_import("plan", "techniques.lora.LoRA") and not may_import("plan", "cli")
    assert not may_import("techniques.lora", "techniques.full.Full") and not may_import("core", "store.disk")
    assert may_import("techniques", "techniques.lora.LoRA") and not may_import(
        "techniques.lora", "techniques.TECHNIQUES"
    )
    assert may_import("cli", "techniques.lora.LoRA") and not may_import("train", "stranger")


def test_no_package_imports_in_a_circle():
    modules = {".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {
        name: {
            target
            for other, _ in imported(path)
            if (target := other if other in modules else other.rpartition(".")[0]) in modules and target != name
        }
        for name, path in modules.items()
    }
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    while roots := [name for name in graph if not any(name in targets for targets in graph.values())]:
        for name in roots:
            del graph[name]
    assert not graph, f"these import one another in a circle: {', '.join(sorted(graph))}"


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


def test_files_and_functions_are_short():
    lines = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    contract = "src/treering/technique.py"  # whoever writes a technique reads this one file
    assert not {name: n for name, n in lines.items() if n > 300 and name != contract}
    assert statistics.median(lines.values()) <= 200
    sizes = {f"{shown(p)}:{name}": length(node) for p in FILES for name, node, _ in functions(p)}
    assert not {name: n for name, n in sizes.items() if n > 90}
    long = {name: n for name, n in sizes.items() if n > 50}
    assert len(long) < 0.06 * len(sizes), long


def test_a_class_name_means_one_class():
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(shown(path))
    assert not {name: files for name, files in places.items() if len(files) > 1}


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
    if package(path) not in ("cli", "demo"):
        banned.add("print")
    matches = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and called(node) in banned:
            matches.append(f"{node.lineno}: {called(node)}(")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            matches += [
                f"{node.lineno}: {n}" for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")
            ]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                matches.append(f"{node.value.lineno}: trust_remote_code")
    assert not matches, f"{shown(path)} {matches}"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_every_file_begins_by_saying_what_it_is(path):
    if path.name == "__init__.py" and len(path.read_text().splitlines()) <= 10:
        return
    assert ast.get_docstring(tree(path)), f"{shown(path)} has no docstring"


def test_tests_are_not_much_shorter_than_the_source():
    count = lambda folder: sum(len(p.read_text(encoding="utf-8").splitlines()) for p in folder.rglob("*.py"))  # noqa: E731
    assert count(ROOT / "tests") >= 0.6 * count(SOURCE)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_every_technique_is_laid_out_like_the_others(name):
    folder = SOURCE / "techniques" / name
    assert (folder / "config.py").is_file() and (folder / "README.md").is_file()
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = {"lora": "LoRA", "osft": "OSFT"}.get(name, name.capitalize())
    assert text.startswith(f"# {title}: ")
    assert "Limits" in text and "```" in text, "formula, limits and how to use it belong there"


def test_a_folder_of_techniques_that_is_not_in_the_list_would_be_seen():
    assert {path.parent.name for path in (SOURCE / "techniques").glob("*/__init__.py")} == FOLDERS


def test_every_technique_has_a_row_in_the_table_of_compositions():
    from tests.test_composition import techniques

    assert {type(technique) for technique in techniques("llama").values()} == set(TECHNIQUES.values())
