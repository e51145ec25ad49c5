"""The house has floors: imports go down only, and what begins with an underscore stays in its package."""

import ast
import importlib.util
from pathlib import Path

import pytest

import spectrumkv_hf
import spectrumkv_kernels

PACKAGES = {package.__name__: Path(package.__file__).parent for package in (spectrumkv_kernels, spectrumkv_hf)}
FLOORS = {
    "spectrumkv_kernels": ("backend", "segment", "rotation", "codec", "attention", "scores", "wire", "operations", ""),
    "spectrumkv_hf": (
        "support", "policy", "attention", "tiered", "wire", "probe", "spectrum_cache", "transfer", "engines",
        "evaluation", "commands", "",
    ),
}  # fmt: skip
"""Rooms from the ground up. The name of none is the package's own `__init__`, which hands out what users need."""


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            yield name, path


MODULES = dict(modules())


def imports(path):
    """`(module, name or None, line)` of each import of these packages in a file, at whatever place it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in found:
            if module.split(".")[0] in PACKAGES:
                inner = f"{module}.{name}"
                yield (inner, None, node.lineno) if inner in MODULES else (module, name, node.lineno)


def room(module):
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    package, here = room(name)
    for module, _, line in imports(MODULES[name]):
        other, there = room(module)
        where = f"{MODULES[name]}:{line} imports {module}"
        if other != package:
            assert package == "spectrumkv_hf", f"{where}: kernels know nothing of the cache"
            continue
        floors = FLOORS[package]
        assert here in floors and there in floors, f"{where}: a room that is not in this test's list"
        if here != there:
            assert floors.index(there) < floors.index(here), f"{where}, which lies above"


def test_no_circles():
    edges = {name: {module for module, _, _ in imports(path) if module != name} for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done and name in edges:
            path.append(name)
            for other in edges[name]:
                visit(other)
            path.pop()
            done.add(name)

    for name in edges:
        visit(name)


@pytest.mark.parametrize("name", MODULES)
def test_private_names_stay_in_their_room(name):
    for module, imported, line in imports(MODULES[name]):
        private = [part for part in (*module.split("."), imported or "") if part.startswith("_")]
        assert not private or room(module) == room(name), f"{MODULES[name]}:{line} imports {module}.{imported}"


def test_engines_are_optional():
    assert importlib.util.find_spec("spectrumkv_hf.engines") is not None
    for name, path in MODULES.items():
        if room(name) != ("spectrumkv_hf", "engines"):
            assert not [module for module, _, _ in imports(path) if room(module) == ("spectrumkv_hf", "engines")], name
