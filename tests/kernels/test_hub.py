"""`kernels/` as Hugging Face's kernel-builder and its loader take it, and several versions of it in one process."""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hub_layout
import spectrumkv_kernels
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.backend.dispatch import VARIABLE

KERNELS = Path(hub_layout.__file__).parent
REPOSITORY = tomllib.loads((KERNELS / "build.toml").read_text())["general"]["hub"]["repo-id"]
NEEDED = "needs the package kernels"
CHANGED = {
    "wire/checksum.py": ("0x9E3779B97F4A7C15", "0xD1B54A32D192ED03"),  # of the table of weights, which is kept
    "wire/affine.py": ("range(3)", "range(10, 13)"),
    "wire/affine.cpp": ("{ SOUND, ", "{ SOUND = 10, "),
}
"""What another version has in another way."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """This version and another one, laid out."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(KERNELS, root / "source", ignore=shutil.ignore_patterns("__pycache__"))
    for file, (old, new) in CHANGED.items():
        path = root / "source" / "spectrumkv_kernels" / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
    hub_layout.lay_out(root / "this")
    hub_layout.lay_out(root / "other", root / "source")
    return root / "this", root / "other"


def about(folder):
    return json.loads((folder / "build/torch-cpu/metadata.json").read_text())


def by_kernels(folder, monkeypatch):
    """As users get it, from a folder in the place of the Hub."""
    kernels = pytest.importorskip("kernels.load", reason=NEEDED)
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPOSITORY}={folder}")
    module = kernels.get_kernel(REPOSITORY, version=about(folder)["version"], backend="cpu")
    assert module.__name__ == about(folder)["id"]
    return module


def by_importlib(folder, monkeypatch):
    """By what that does, under a name of our own."""
    name = f"_{folder.name}_by_importlib"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "build/torch-cpu/__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(params=[by_kernels, by_importlib])
def packages(request, folders, monkeypatch, tmp_path):
    """The installed package, the same once more, and the other version; none has compiled C++ of its own before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    found = [spectrumkv_kernels, *(request.param(folder, monkeypatch) for folder in folders)]
    libraries = [module(package, f"wire.cpp_{name}").library for package in found for name in ("checksum", "affine")]
    for library in libraries:
        library.cache_clear()
    yield found
    for library in libraries:  # whose files are gone when the test is over
        library.cache_clear()


def module(package, name):
    return importlib.import_module(f"{package.__name__}.{name}")


def test_each_is_a_package_of_its_own(packages):
    """With its own classes, and operations that choose an implementation by themselves."""
    assert len({package.__name__ for package in packages}) == len({package.__file__ for package in packages}) == 3
    assert len({package.Segment for package in packages}) == 3
    for package in packages:
        operations = module(package, "backend.dispatch").operations()
        assert package.tiered_attention in operations
        for operation in operations:
            assert operation.on("cpu").__module__.startswith(f"{package.__name__}.")


@pytest.mark.parametrize("implementation", ["torch", "cpp", "triton"])
def test_results_and_kept_tables(packages, implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    elif implementation == "cpp" and not build_cpp.compilers():
        pytest.skip("no C++ compiler")
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    words = torch.randint(-(2**63), 2**63 - 1, (3000,), device=device)
    sums = [package.digest_sums.load(implementation)(words) for package in packages]
    for package, found in zip(packages, sums, strict=True):
        assert torch.equal(found, package.digest_sums.reference(words))
    assert torch.equal(sums[0], sums[1]) and not torch.equal(sums[0], sums[2])
    tables = [module(package, "wire.checksum").row_weights for package in packages]
    packages[1].clear_caches()
    assert [bool(table.cache_info().currsize) for table in tables] == [True, False, True]


@pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")
def test_compiled_libraries(packages, tmp_path):
    """Versions share those whose sources are the same, and no others."""
    affine = [torch.tensor([[1.0, torch.nan]], dtype=torch.float16)]
    assert [package.affine_flaws(affine) for package in packages] == [[1], [1], [11]]
    for package in packages:
        assert package.affine_flaws.on("cpu").__module__ == f"{package.__name__}.wire.cpp_affine"
        assert package.affine_flaws.reference(affine) == package.affine_flaws(affine)
        package.digest_sums(torch.ones(8, dtype=torch.int64))
    built = [file.name.partition("-")[0] for file in (tmp_path / "spectrumkv/compiled").glob("*.so")]
    assert sorted(built) == ["affine", "affine", "checksum"]


def stepped(package, kv_heads, compiled):
    """Attention of the last of five tokens, which come one by one to a layer of fixed capacity, and plain attention."""
    layouts, library = module(package, "static.layout"), module(package, "static.library")
    layout = layouts.Layout(
        batch=1, kv_heads=kv_heads, key_dim=32, value_dim=32, dtype=torch.float32, capacity=8, ring=8, rooms=(),
        recent_window=0, sinks=0, padded=False, ragged=False, score="recency", decay=0.0,
        codec=package.CODECS["absmax"], rotary=package.Rotary(),
    )  # fmt: skip
    number = layouts.number_of(layout)
    buffer, state = torch.zeros(layout.size, dtype=torch.uint8), torch.zeros(layouts.STATE, dtype=torch.int32)

    def step(query, keys, values):
        library.append(buffer, state, keys, values, number)
        return library.attend(query, buffer, state, number, 1.0, None, None, None, None)

    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    query, keys, values = torch.randn(3, 1, kv_heads, 5, 32)
    tokens = [slice(i, i + 1) for i in range(5)]
    found = [step(query[:, :, token], keys[:, :, token], values[:, :, token]) for token in tokens]
    return torch.cat(found, dim=2), scaled_dot_product_attention(query, keys, values, is_causal=True, scale=1.0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_operations_of_pytorch(packages, compiled):
    """Each package's are in a namespace of its own, and know a layout by the number that this package gave it."""
    for package, kv_heads in zip(packages, (2, 3, 4), strict=True):
        torch.testing.assert_close(*stepped(package, kv_heads, compiled))
        operations = getattr(torch.ops, package.__name__)
        for name in ("append", "attend"):
            assert getattr(operations, name).default.name() == f"{package.__name__}::{name}"


def test_snippet_of_the_card(folders, monkeypatch):
    """Its ten lines run, and what they compute is attention, but for the error of 4 bits."""
    by_kernels(folders[0], monkeypatch)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (KERNELS / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(snippet, names)
    assert names["kv"].__name__ == about(folders[0])["id"]
    output, query, keys, values = (names[name] for name in ("output", "query", "keys", "values"))
    exact = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert (output - exact).norm() < 0.25 * exact.norm()


def test_loading_needs_no_transformers(folders):
    """Nor this package as it is installed, nor the cache, for any module."""
    build = folders[0] / "build/torch-cpu"
    names = [".".join(path.relative_to(build).with_suffix("").parts) for path in build.rglob("*.py")]
    names = [name.removesuffix("__init__").rstrip(".") for name in names]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if "triton" not in name]
    code = f"""
import importlib, importlib.util, sys
for name in ("transformers", "spectrumkv_hf", "spectrumkv_kernels"):
    sys.modules[name] = None  # importing it fails
spec = importlib.util.spec_from_file_location("_other", {str(build / "__init__.py")!r})
sys.modules["_other"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name in {names!r}:
    importlib.import_module("_other." + name if name else "_other")
print(len([name for name in sys.modules if name.startswith("_other.")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len([name for name in names if name])


def test_what_the_builder_reads(folders):
    """It writes files of its own there, and refuses where they exist."""
    package = folders[0] / "torch-ext/spectrumkv_kernels"
    assert (package / "__init__.py").exists() and not (package / "spectrumkv_kernels").exists()
    assert not {"_ops.py", "setup.py", "pyproject.toml"} & {path.name for path in folders[0].rglob("*")}
    suffixes = {path.suffix for path in package.rglob("*") if path.is_file()}
    assert suffixes == {".py", ".cpp", ".h"}
    sources = {path.name for path in (KERNELS / "spectrumkv_kernels").rglob("*") if path.suffix in suffixes}
    assert sources == {path.name for path in package.rglob("*") if path.is_file()}
    assert (folders[0] / "CARD.md").read_text() == (folders[0] / "build/CARD.md").read_text()
    assert "{{" not in (KERNELS / "README.md").read_text(), "the builder takes the card for a template"


def test_the_builders_own_reader_takes_its_settings(folders):
    read = pytest.importorskip("kernels._rust", reason=NEEDED).Build.open(folders[0])
    variants = {f"torch-{str(backend).lower()}" for backend in read.general.backends}
    assert variants == {path.parent.name for path in folders[0].glob("build/*/metadata.json")}


def test_the_builders_check_of_registrations(folders):
    """It looks for the function's name at each."""
    registrations = [
        node
        for path in (folders[0] / "torch-ext").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("custom_op", "triton_op"))
    ]
    assert len(registrations) == 4
    assert all(ast.unparse(node.args[0]).startswith("add_op_namespace_prefix(") for node in registrations)


def test_a_version_is_told_by_its_contents(folders, tmp_path):
    hub_layout.lay_out(tmp_path / "again")
    assert about(tmp_path / "again") == about(folders[0]) and about(folders[0])["id"] != about(folders[1])["id"]
    assert about(folders[0])["id"].isidentifier()
