"""Imports go one way, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import rapidindex

PACKAGE = Path(rapidindex.__file__).parent
LIGHT = (
    "errors",
    "config",
    "progress",
    "results",
    "selection",
    "render",
    "cards",
    "chips",
    "report",
    "untrusted",
    "rows",
    "examples",
    "cli",
    "sources",
    "store",
)
LAYERS = [
    {"errors"},
    {"config", "progress"},
    {"results", "chips", "report", "untrusted", "rows", "examples", "store", "sketch", "sources"},
    {"selection", "cards", "render", "templates", "tokens", "loading", "gradients", "exact", "ann"},
    {"activations", "model", "eigenbases", "corrections", "rapidgrad", "recall", "card"},
    {"heatmaps", "index", "finetune", "training"},
    {"caching", "jobs", "room", "workers", "build"},
    {"growth", "estimate"},
    {"query"},
    {"demo"},
    {"cli", "__init__", "__main__"},
]
"""A module imports from the sets above its own, or from its own."""


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield name, ast.parse(path.read_text())


def imported(tree, *, everywhere):
    """Names of rapidindex's modules imported at the top of a module, or anywhere in it."""
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rapidindex"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set().union(*LAYERS)


def test_imports_go_one_way():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules()
        for other in imported(tree, everywhere=name not in ("__init__", "cli"))
        if level[other] > level[name]
    ]
    assert not wrong


def test_light_modules_import_neither_torch_nor_faiss():
    imports = "; ".join(f"import rapidindex.{name}" for name in LIGHT)
    code = f"import sys; {imports}; print({{'torch', 'faiss'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_only_the_public_names_are_exported():
    assert rapidindex.__all__ == ["Index", "Match", "Query", "RapidIndexError", "Result"]
    assert all(getattr(rapidindex, name) for name in rapidindex.__all__)


def test_the_library_never_prints():
    printing = {"cli", "progress"}
    calls = [
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(calls) <= printing
