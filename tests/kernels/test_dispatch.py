import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectrumkv_kernels import build_cpp, dispatch, operation
from spectrumkv_kernels.dispatch import COMPILED, IMPLEMENTATIONS, OPERATIONS, VARIABLE, WITHOUT_TRITON

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def module_of(function):
    return function.__module__.removeprefix("spectrumkv_kernels.")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_variable_name():
    assert VARIABLE == "SPECTRUMKV_KERNELS"


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_on_cpu_where_forced(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, "torch")
    function = operation(name, CPU)
    assert function.__name__ == name and module_of(function) == OPERATIONS[name]


@pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("setting", ["", "cpp"], ids=["empty", "cpp"])
def test_compiled_on_cpu(monkeypatch, setting, name):
    monkeypatch.setenv(VARIABLE, setting)
    function = operation(name, CPU)
    suffix = "_cpp" if name in COMPILED else ""
    assert function.__name__ == name and module_of(function) == OPERATIONS[name] + suffix


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_on_a_device_without_own_implementation(name):
    assert module_of(operation(name, torch.device("meta"))) == OPERATIONS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_triton_on_cuda_or_where_forced(monkeypatch, name):
    pytest.importorskip("triton")
    on_cuda = operation(name, CUDA)
    suffix = "" if name in WITHOUT_TRITON else "_triton"
    assert on_cuda.__name__ == name and module_of(on_cuda) == OPERATIONS[name] + suffix
    monkeypatch.setenv(VARIABLE, "triton")
    assert operation(name, CPU) is on_cuda
    monkeypatch.setenv(VARIABLE, "torch")
    assert module_of(operation(name, CUDA)) == OPERATIONS[name]


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("sys.modules['triton'] = None", "ModuleNotFoundError"),
        ("import triton; del triton.constexpr_function", "AttributeError"),  # as in Triton 3.4
        ("import triton.language; del triton.language.inline_asm_elementwise, triton.jit", "AttributeError"),
    ],
)
def test_torch_on_cuda_where_triton_or_a_part_of_it_is_missing(missing, error):
    """One log line, and every operation in plain torch; where Triton is asked for, a clear refusal."""
    if "None" not in missing:
        pytest.importorskip("triton")
    script = f"""
import sys
{missing}
import logging, os, torch
logging.basicConfig(format="LOG %(message)s", stream=sys.stdout)
from spectrumkv_kernels import dispatch, operation
modules = {{operation(name, torch.device("cuda")).__module__ for name in dispatch.OPERATIONS}}
assert not any(name.endswith(("_triton", "_cpp")) for name in modules), modules
os.environ[dispatch.VARIABLE] = "triton"
try:
    operation("tiered_attention", torch.device("cuda"))
except ImportError as refusal:
    print("REFUSED", refusal)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged, refused = done.stdout.splitlines()
    assert (
        logged.startswith("LOG SpectrumKV runs in plain torch, slower: kernels in Triton, for CUDA, can't be used (")
        and error in logged
    )
    assert (
        refused.startswith("REFUSED the triton implementation of tiered_attention can't be loaded: ")
        and error in refused
    )


def test_unknown_implementation(monkeypatch):
    monkeypatch.setenv(VARIABLE, "no-such-thing")
    with pytest.raises(ValueError, match="no-such-thing") as raised:
        operation("decode", CPU)
    message = str(raised.value)
    assert VARIABLE in message
    assert all(choice in message for choice in IMPLEMENTATIONS)


def test_an_implementation_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "other", "_other")
    monkeypatch.setenv(VARIABLE, "other")
    with pytest.raises(ModuleNotFoundError, match="other implementation of decode"):
        operation("decode", CPU)


def test_unknown_operation():
    with pytest.raises(KeyError, match="no-such-operation"):
        operation("no-such-operation", CPU)


@pytest.mark.parametrize(
    "contents",
    ["", "raise RuntimeError('of another machine')", "import no_such_module", "raise SyntaxError('of another Python')"],
    ids=["lacks everything", "raises", "lacks a module", "is no Python"],
)
def test_torch_on_cuda_where_triton_is_of_no_use(contents, tmp_path):
    """Whatever an odd version raises: one line in the log for all operations, and one sentence where it is forced."""
    package = tmp_path / "triton"
    for folder in (package, package / "language"):
        folder.mkdir()
        (folder / "__init__.py").write_text(contents)
    code = """
import logging, os
logging.basicConfig(format="log: %(levelname)s %(message)s")
import torch
from spectrumkv_kernels import dispatch
for name in 2 * tuple(dispatch.OPERATIONS):
    print(dispatch.operation(name, torch.device("cuda")).__module__.rpartition(".")[2] == dispatch.OPERATIONS[name])
os.environ[dispatch.VARIABLE] = "triton"
try:
    dispatch.operation("decode", torch.device("cuda"))
except ImportError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(root / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *same, refusal = done.stdout.splitlines()
    assert same == ["True"] * 2 * len(OPERATIONS)
    assert refusal.startswith("the triton implementation of decode can't be loaded: ")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("log: ")]
    assert line.startswith("log: WARNING SpectrumKV runs in plain torch, slower: kernels in Triton, for CUDA, can't be")


def test_an_unknown_operation_spoils_nothing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_unusable", set())
    for device in (CPU, CUDA):
        with pytest.raises(KeyError):
            operation("no-such-operation", device)
    assert not dispatch._unusable
