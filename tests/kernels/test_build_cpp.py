import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectrumkv_kernels import (
    affine_cpp,
    attention,
    attention_cpp,
    build_cpp,
    checksum_cpp,
    dispatch,
    operation,
    tier_map_cpp,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
MODULES = (affine_cpp, attention_cpp, checksum_cpp, tier_map_cpp)

needs_compiler = pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered from other tests."""
    libraries = [module.library for module in MODULES]
    remembered = (dispatch.default_implementation, dispatch._load, *libraries)
    for function in remembered:
        function.cache_clear()
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "spectrumkv"
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def source(cache, tmp_path, monkeypatch):
    """A small source in the place of the real one."""
    monkeypatch.setattr(build_cpp, "FOLDER", tmp_path)
    path = tmp_path / "small.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_default_on_a_cpu(cache, caplog):
    with caplog.at_level(logging.INFO, "spectrumkv_kernels"):
        for _ in range(3):
            assert operation("tiered_attention", CPU) is attention_cpp.tiered_attention
    assert len(caplog.records) == 1 and "C++" in caplog.text
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("why", ["none", "fails", "hangs", "folder"])
def test_torch_where_nothing_can_be_built(cache, caplog, monkeypatch, no_compiler, tmp_path, why):
    if why in ("fails", "hangs"):
        text = "echo it: error: no such luck >&2; exit 1" if why == "fails" else "while :; do :; done"
        monkeypatch.setenv("CXX", script(tmp_path / "c++", f'[ "$1" = --version ] && exit\n{text}'))
        monkeypatch.setattr(build_cpp, "TIMEOUT", 5 if why == "fails" else 0.3)
    if why == "folder":
        monkeypatch.undo()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "spectrumkv_kernels"):
        for _ in range(3):
            assert operation("tiered_attention", CPU) is attention.tiered_attention
    assert len(caplog.records) == 1 and "torch" in caplog.text
    reason = {
        "none": "no C++ compiler",
        "fails": "no such luck",
        "hangs": "timed out",
        "folder": str(tmp_path / "file"),
    }
    assert reason[why] in caplog.text
    assert not cache.exists() or not list(cache.iterdir())


def test_forced_where_nothing_can_be_built(cache, monkeypatch, no_compiler):
    monkeypatch.setenv(dispatch.VARIABLE, "cpp")
    for name in dispatch.COMPILED:
        with pytest.raises(OSError, match="no C\\+\\+ compiler"):
            operation(name, CPU)
    assert operation("decode", CPU).__module__ == "spectrumkv_kernels.codec"


def test_nothing_is_built_before_it_is_needed(cache, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "library", lambda: pytest.fail("built"))
    for name in set(dispatch.OPERATIONS) - set(dispatch.COMPILED):
        operation(name, CPU)


@needs_compiler
def test_built_once(source, cache, monkeypatch):
    assert build_cpp.load("small").answer() == 42
    monkeypatch.setattr(build_cpp, "_build", lambda *args: pytest.fail("built again"))
    assert build_cpp.load("small").answer() == 42


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "flags", "processor", "compiler"])
def test_built_anew_after_a_change(source, cache, monkeypatch, change):
    build_cpp.load("small")
    if change == "source":
        source.write_text('extern "C" int answer() { return 43; }')
        assert build_cpp.load("small").answer() == 43
    elif change == "header":
        source.with_name("small_parts.h").write_text("// more")
    elif change == "flags":
        monkeypatch.setattr(build_cpp, "FLAGS", (*build_cpp.FLAGS, "-g"))
    elif change == "processor":
        monkeypatch.setattr(build_cpp, "_processor", lambda: "another")
    else:
        monkeypatch.setattr(build_cpp, "_version", lambda compiler: "another")
    build_cpp.load("small")
    assert len(list(cache.glob("small-*.so"))) == 2


@needs_compiler
def test_a_damaged_library_is_built_anew(source, cache):
    path = build_cpp._cached("small", build_cpp.compilers()[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF, once")
    assert build_cpp.load("small").answer() == 42
    assert ctypes.CDLL(str(path)).answer() == 42


@needs_compiler
def test_the_next_compiler_where_one_fails(source, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "mine", "exit 1"))
    assert len(build_cpp.compilers()) > 1 and build_cpp.compilers()[0] == str(tmp_path / "mine")
    assert build_cpp.load("small").answer() == 42


@needs_compiler
def test_processes_that_build_at_once(source, cache):
    code = (
        "import sys; from pathlib import Path; from spectrumkv_kernels import build_cpp; "
        f"build_cpp.FOLDER = Path({str(source.parent)!r}); print('ready', flush=True); sys.stdin.read(1); "
        "print(build_cpp.load('small').answer())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write(".")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in both] == ["42", "42"]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_compilers_under_two_names_count_once(monkeypatch, tmp_path):
    script(tmp_path / "g++", "")
    (tmp_path / "c++").symlink_to("g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++")
    assert build_cpp.compilers() == [shutil.which("g++")]
    monkeypatch.delenv("CXX")
    assert build_cpp.compilers() == [str(tmp_path / "c++")]
