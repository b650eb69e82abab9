"""Imports go one way between rooms and in no circle between files; light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rapidindex

PACKAGE = Path(rapidindex.__file__).parent
TIERS = [
    {"errors"},
    {"progress", "cluster", "typed"},
    {"config", "recipe", "results"},
    {"data", "gradients", "store", "views"},
    {"model", "search"},
    {"encoder"},
    {"caching", "query"},
    {"evaluate"},
    {"serve", "demo"},
    {"cli", "__init__"},
    {"__main__"},
]
"""A room imports from itself and from the tiers above its own, never from its neighbours unless `BESIDE` says so."""
BESIDE = {("recipe", "config"), ("gradients", "data"), ("query", "caching")}
LAZY = {
    ("rapidindex.results", "rapidindex.views.html"),
    ("rapidindex.query.index", "rapidindex.query.two_stages"),
    ("rapidindex.query.index", "rapidindex.query.checkpoints"),
}
"""The imports upward: a result shows itself, and other kinds of index are opened as any."""
LIGHT = (
    "config",
    "results",
    "data.tokens",
    "data.examples",
    "model.files",
    "store",
    "views.terminal",
    "views.html",
    "cli",
)

Modules = dict[str, ast.Module]


def package() -> Modules:
    """Every module of the package by its name."""
    return {_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, modules: Modules) -> set[str]:
    """The modules of the package that `module` imports, anywhere in it."""
    found = set()
    for node in ast.walk(modules[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rapidindex":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # The door of store has names that are modules' too.
            inside = node.module != "rapidindex.store" or room(module) == "store"
            found |= {name if inside and name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "rapidindex"}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def faults(modules: Modules) -> list[str]:
    """What is wrong with the imports of these modules."""
    tier = {name: number for number, names in enumerate(TIERS) for name in names}
    graph = {name: imports(name, modules) for name in modules}
    found = [f"{name} has no place" for name in modules if room(name) not in tier]
    for name, others in graph.items():
        for other in others - {there for here, there in LAZY if here == name}:
            here, there = room(name), room(other)
            if here == there:
                continue
            if tier[there] > tier[here] or (tier[there] == tier[here] and (here, there) not in BESIDE):
                found.append(f"{name} imports {other}")
            if there == "store" and other != "rapidindex.store":
                found.append(f"{name} imports {other}, past store's door")
    return found + [f"{' -> '.join(circle)} is a circle" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each circle of modules that import one another, once, as the path found first."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                if (name, other) not in LAZY:
                    visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_every_import_goes_one_way():
    assert not faults(package())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("rapidindex.gradients.sketch", "from rapidindex.search.exact import top"),
        ("rapidindex.query.index", "from rapidindex.store.shards import row_bytes"),
        ("rapidindex.errors", "from rapidindex import config"),
        ("rapidindex.model.files", "from rapidindex.model.loading import quiet_libraries"),
        ("rapidindex.views.sanitize", "def f():\n    from rapidindex.views.terminal import result"),
    ],
)
def test_a_wrong_import_is_found(module, line):
    modules = package()
    modules[module].body += ast.parse(line).body
    assert faults(modules)


def test_light_modules_import_neither_torch_nor_faiss():
    lines = "; ".join(f"import rapidindex.{name}" for name in LIGHT)
    code = f"import sys; {lines}; print({{'torch', 'faiss'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_only_the_public_names_are_exported():
    assert sorted(rapidindex._HOME) == sorted(rapidindex.__all__)
    assert all(getattr(rapidindex, name) for name in rapidindex.__all__)


def test_the_library_never_prints():
    calls = {
        room(name)
        for name, tree in package().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert calls <= {"__main__", "cli", "progress"}
