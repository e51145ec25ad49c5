"""The house has floors: imports go down only, and what begins with an underscore stays in its package."""

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import spectrumkv_hf
import spectrumkv_kernels

PACKAGES = {package.__name__: Path(package.__file__).parent for package in (spectrumkv_kernels, spectrumkv_hf)}
FLOORS = {
    "spectrumkv_kernels": (
        "backend", "segment", "rotation", "codec", "attention", "scores", "wire", "operations", "static", "",
    ),
    "spectrumkv_hf": (
        "version", "support", "policy", "attention", "tiered", "wire", "probe", "spectrum_cache", "transfer", "engines",
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


def statements(name):
    """`(module, name or None, line, relative)` of each import in a module, at whatever place it stands."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, alias.name, node.lineno, node.level > 0) for alias in node.names)


def imports(name):
    """`(module, name or None, line)` of each import of these packages in a module."""
    for module, imported, line, _ in statements(name):
        if module.split(".")[0] in PACKAGES:
            inner = f"{module}.{imported}"
            yield (inner, None, line) if inner in MODULES else (module, imported, line)


def room(module):
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    package, here = room(name)
    for module, _, line in imports(name):
        other, there = room(module)
        where = f"{MODULES[name]}:{line} imports {module}"
        if other != package:
            assert package == "spectrumkv_hf", f"{where}: kernels know nothing of the cache"
            continue
        floors = FLOORS[package]
        assert here in floors and there in floors, f"{where}: a room that is not in this test's list"
        if here != there:
            assert floors.index(there) < floors.index(here), f"{where}, which lies above"


@pytest.mark.parametrize("name", MODULES)
def test_kernels_work_under_any_name(name):
    """The Hub's loader gives them one of its own, where PyTorch alone is sure to be. The cache uses full names."""
    package, _ = room(name)
    for module, _, line, relative in statements(name):
        where = f"{MODULES[name]}:{line} imports {module}"
        if package == "spectrumkv_hf":
            assert not relative, f"{where} relatively"
        elif not relative:
            assert module.split(".")[0] in {"torch", "triton"} | sys.stdlib_module_names, where


def test_no_circles():
    edges = {name: {module for module, _, _ in imports(name) if module != name} for name in MODULES}
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
    for module, imported, line in imports(name):
        private = [
            part for part in (*module.split("."), imported or "") if part.startswith("_") and not part.endswith("__")
        ]
        assert not private or room(module) == room(name), f"{MODULES[name]}:{line} imports {module}.{imported}"


def private_names(tree):
    """Those that a module defines, and those of other objects that it uses."""
    defined, used = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if of_self and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif not of_self:
                used.append((node.lineno, node.attr))
    return {name for name in defined if name.startswith("_")}, used


def test_private_attributes_stay_in_their_room():
    found = {name: private_names(ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}
    rooms = {}
    for name, (defined, _) in found.items():
        rooms.setdefault(room(name), set()).update(defined)
    ours = set().union(*rooms.values()) - {"_replace", "_version"}  # of NamedTuple and of tensors
    for name, (_, used) in found.items():
        beyond = [(line, attribute) for line, attribute in used if attribute in ours - rooms[room(name)]]
        assert not beyond, f"{MODULES[name]} uses private names of another room: {beyond}"


CORE = ("support", "policy", "attention", "tiered", "wire", "transfer", "engines")
FOREIGN = {
    "wire/stock.py": "layers of Transformers' own classes, which can't be assembled otherwise",
    "support/whole_file.py": "the error is given the name of the file that the caller knows",
    "transfer/exchange.py": "an error of this module's own class learns what came of the connection",
}
"""Files that write into objects that they were given, and why."""


def own(function):
    """Names of objects that a function makes, or takes from `self`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
            for target, value in list(pairs):
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs += zip(target.elts, value.elts, strict=True)
            for target, value in pairs:
                of_self = isinstance(value, ast.Attribute) and ast.unparse(value).startswith("self.")
                if isinstance(target, ast.Name) and (isinstance(value, ast.Call) or of_self):
                    yield target.id


def foreign_writes(tree):
    """Attributes of objects that a function was given, and writes into."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        allowed = {"self", "cls", *own(function)}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.Delete):
                targets = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            else:
                continue
            for target in targets:
                for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                    root = each
                    while isinstance(root, ast.Attribute | ast.Subscript):
                        root = root.value
                    if isinstance(each, ast.Attribute) and not (isinstance(root, ast.Name) and root.id in allowed):
                        yield node.lineno, ast.unparse(each)


def test_foreign_writes_are_found():
    source = "def f(self, layer):\n    self.a.b = 1\n    made = C()\n    made.x = 2\n    layer.store.length, y = 3, 4"
    assert list(foreign_writes(ast.parse(source))) == [(5, "layer.store.length")]


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("spectrumkv_kernels") or room(n)[1] in CORE])
def test_nobody_writes_into_objects_of_others(name):
    path = MODULES[name]
    found = list(foreign_writes(ast.parse(path.read_text(encoding="utf-8"))))
    if str(path.relative_to(PACKAGES[name.partition(".")[0]])) in FOREIGN:
        assert found, f"{path} need not be in FOREIGN any more"
    else:
        # What is put in the place of Transformers' look-up of attention functions, and back.
        assert [target for _, target in found if not target.startswith("ALL_ATTENTION_FUNCTIONS.")] == [], path
