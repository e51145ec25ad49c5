"""Tensors that are kept between calls: each function's are bounded, and one call forgets them all."""

import ast
import contextlib
import gc
import importlib
import weakref
from pathlib import Path

import pytest
import torch

import spectrumkv_hf
import spectrumkv_kernels
from spectrumkv_hf.tiered import store
from spectrumkv_kernels import Rotary, clear_caches
from spectrumkv_kernels.backend import tensor_cache
from spectrumkv_kernels.backend.tensor_cache import keep, keep_longest
from spectrumkv_kernels.rotation import hadamard
from spectrumkv_kernels.scores import reference as scores
from spectrumkv_kernels.wire import checksum, tier_map

CPU = torch.device("cpu")
ROTARY = Rotary((1.0, 0.1))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Functions that a test decorates are forgotten with it; modules have registered theirs before."""
    with contextlib.suppress(ImportError):
        importlib.import_module("spectrumkv_kernels.attention.triton_attention")
    monkeypatch.setattr(tensor_cache, "_clearers", list(tensor_cache._clearers))


def triton_attention():
    return pytest.importorskip("spectrumkv_kernels.attention.triton_attention")


KEPT = {
    "hadamard_matrix": lambda: hadamard.hadamard_matrix(64, CPU),
    "probes": lambda: scores._probes_of_all(100, 8, 8, CPU),
    "row_weights": lambda: checksum.row_weights(CPU),
    "codes_of_bytes": lambda: tier_map._codes_of_bytes(2, CPU),
    "table": lambda: ROTARY.table(100, CPU),
    "steps": lambda: ROTARY.steps(256, 100, CPU),
    "counting": lambda: store._counting_to(100, CPU),
    "attention's tables": lambda: triton_attention().tables(100, ROTARY, CPU)[0],
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_until_cleared(name):
    clear_caches()
    first = KEPT[name]()
    assert KEPT[name]() is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is not None
    clear_caches()
    gc.collect()
    assert gone() is None
    assert isinstance(KEPT[name](), torch.Tensor)


def test_every_function_that_keeps_tensors_is_bounded():
    made = []
    kept = keep(3)(lambda n: made.append(n) or torch.zeros(n))
    longest = keep_longest(4, count=2)(lambda length, *key: made.append((length, *key)) or torch.zeros(length))
    results = [weakref.ref(kept(n)) for n in range(10)] + [weakref.ref(longest(1, key)) for key in range(10)]
    gc.collect()
    assert [i for i, result in enumerate(results) if result() is not None] == [7, 8, 9, 18, 19]


def test_only_the_longest_of_a_table_stays():
    made = []
    table = keep_longest(16)(lambda length, name: made.append((length, name)) or torch.arange(length))
    found = {}
    for length in (1, 5, 16, 17, 30, 100, 20, 1, 129):
        found[length] = weakref.ref(table(length, "a"))
        assert len(table(length, "a")) >= length and torch.equal(table(length, "a")[:5], torch.arange(5))
    table(1, "b")
    assert made == [(16, "a"), (32, "a"), (128, "a"), (256, "a"), (16, "b")]
    gc.collect()
    assert found[100]() is None and found[16]() is None and found[129]() is table(1, "a")


def test_a_table_that_a_captured_graph_reads_stays(monkeypatch):
    """Its address is in the graph, which may be replayed after another cache has needed a longer one."""
    table, cuda = keep_longest(16)(lambda length, device: torch.arange(length)), torch.device("cuda")
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    before = weakref.ref(table(1, cuda))
    table(17, cuda)
    capturing.append(1)
    captured = weakref.ref(table(20, cuda))
    capturing.clear()
    table(100, cuda)
    gc.collect()
    assert before() is None and len(captured()) == 32
    clear_caches()
    gc.collect()
    assert captured() is None


# No cache of tensors but by these functions. A function or a module's variable is known to hold tensors by its
# annotations, which all have: they name Tensor, or a class whose fields do.

PACKAGES = [Path(package.__file__).parent for package in (spectrumkv_kernels, spectrumkv_hf)]
SOURCES = {path: path.read_text(encoding="utf-8") for folder in PACKAGES for path in sorted(folder.rglob("*.py"))}
CACHES = {"cache", "lru_cache"}
CONTAINERS = (ast.Dict, ast.List, ast.Set, ast.Call, ast.DictComp, ast.ListComp, ast.SetComp)


def names(node):
    """All names in an annotation, also within strings."""
    for part in ast.walk(node) if node is not None else ():
        if isinstance(part, ast.Name | ast.Attribute):
            yield part.id if isinstance(part, ast.Name) else part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from names(ast.parse(part.value, mode="eval"))


def holders(trees):
    """Names of classes of which an instance holds a tensor, by the annotations of its fields or those it inherits."""
    found = {"Tensor", "Module"}
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        more = {
            node.name for node in classes
            for part in (*node.bases, *(field.annotation for field in node.body if isinstance(field, ast.AnnAssign)))
            if not found.isdisjoint(names(part))
        } - found  # fmt: skip
        if not more:
            return found
        found |= more


def called(node):
    function = node.func if isinstance(node, ast.Call) else node
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def unbounded(tree, holding):
    """`(line, what)` of each cache of tensors that outlives a call and no one can clear."""
    for node in ast.walk(tree):  # functions in functions, and their caches, go with the call
        if isinstance(node, ast.Module | ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    arguments = [*inner.args.posonlyargs, *inner.args.args, *inner.args.kwonlyargs]
                    annotations = [inner.returns, *(argument.annotation for argument in arguments)]
                    if any(called(decorator) in CACHES for decorator in inner.decorator_list) and any(
                        a is not None and not holding.isdisjoint(names(a)) for a in annotations
                    ):
                        yield inner.lineno, inner.name
                elif isinstance(inner, ast.AnnAssign) and isinstance(node, ast.Module):
                    weak = isinstance(inner.value, ast.Call) and called(inner.value).startswith("Weak")
                    held = isinstance(inner.value, CONTAINERS) and not holding.isdisjoint(names(inner.annotation))
                    if held and not weak:
                        yield inner.lineno, inner.target.id
                elif isinstance(inner, ast.Assign) and any(
                    isinstance(part, ast.Call) and called(part) in CACHES for part in ast.walk(inner.value)
                ):
                    yield inner.lineno, "a cache that is no decorator: what it keeps can't be told"


TREES = {path: ast.parse(text) for path, text in SOURCES.items()}
HOLDING = holders(TREES.values())


@pytest.mark.parametrize("path", TREES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_other_cache_of_tensors(path):
    assert list(unbounded(TREES[path], HOLDING)) == [], "use spectrumkv_kernels.backend.tensor_cache"


@pytest.mark.parametrize(
    "text",
    [
        "@functools.cache\ndef f(n: int) -> torch.Tensor: ...",
        "@lru_cache(maxsize=4)\ndef f(n: int) -> 'tuple[Tensor, int] | None': ...",
        "@functools.lru_cache\ndef f(n: int) -> Inner: ...",
        "@cache\ndef f(plan: Outer) -> int: ...",
        "class A:\n    @functools.cache\n    def f(self) -> dict[int, torch.Tensor]: ...",
        "_known: dict[int, torch.Tensor] = {}",
        "_known: list[Outer] = []",
        "_known: dict[str, Inner] = defaultdict(Inner)",
        "f = functools.cache(g)",
    ],
)
def test_the_guard_finds(text):
    classes = "class Outer(NamedTuple):\n    inner: Inner | None\nclass Inner:\n    x: list[torch.Tensor]\n"
    tree = ast.parse(classes + text)
    assert list(unbounded(tree, holders([tree])))


@pytest.mark.parametrize(
    "text",
    [
        "@functools.cache\ndef f(n: int) -> str: ...",
        "@keep(4)\ndef f(n: int) -> torch.Tensor: ...",
        "_known: WeakKeyDictionary[int, torch.Tensor] = WeakKeyDictionary()",
        "def f() -> None:\n    @lru_cache(maxsize=1)\n    def g() -> torch.Tensor: ...",
        "class A:\n    @functools.cached_property\n    def f(self) -> torch.Tensor: ...",
    ],
)
def test_the_guard_lets_pass(text):
    assert not list(unbounded(ast.parse(text), {"Tensor"}))


def test_the_guard_knows_the_classes_that_hold_tensors():
    assert {"Quantized", "Segment", "Arena", "Contents", "_Laid"} <= HOLDING
    assert {"Rotary", "Codec", "Tier"}.isdisjoint(HOLDING)
