import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectrumkv_kernels import decode, tiered_attention
from spectrumkv_kernels.backend import build_cpp, dispatch
from spectrumkv_kernels.backend.dispatch import IMPLEMENTATIONS, VARIABLE, Operation, operations

ROOT = Path(__file__).resolve().parents[3]
each_operation = pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.__name__)


def module_of(function):
    return function.__module__.removeprefix("spectrumkv_kernels.")


def has(operation, implementation):
    return implementation in repr(operation)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_variable_name():
    assert VARIABLE == "SPECTRUMKV_KERNELS"


@each_operation
def test_torch_on_cpu_where_forced(monkeypatch, operation):
    monkeypatch.setenv(VARIABLE, "torch")
    assert operation.on("cpu") is operation.on("cuda") is operation.reference


@pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")
@each_operation
@pytest.mark.parametrize("setting", ["", "cpp"], ids=["empty", "cpp"])
def test_compiled_on_cpu(monkeypatch, setting, operation):
    monkeypatch.setenv(VARIABLE, setting)
    function = operation.on("cpu")
    assert function.__name__ == operation.__name__
    assert ("cpp" in module_of(function)) == has(operation, "cpp")
    if not has(operation, "cpp"):
        assert function is operation.reference


@each_operation
def test_torch_on_a_device_without_own_implementation(operation):
    assert operation.on("meta") is operation.reference


@each_operation
def test_triton_on_cuda_or_where_forced(monkeypatch, operation):
    pytest.importorskip("triton")
    on_cuda = operation.on("cuda")
    assert on_cuda.__name__ == operation.__name__ and ("triton" in module_of(on_cuda)) == has(operation, "triton")
    if not has(operation, "triton"):
        assert on_cuda is operation.reference
    monkeypatch.setenv(VARIABLE, "triton")
    assert operation.on("cpu") is on_cuda


@each_operation
@pytest.mark.parametrize("implementation", ["triton", "cpp"])
def test_implementations_have_one_signature(operation, implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    elif not build_cpp.compilers():
        pytest.skip("no C++ compiler")
    ours, theirs = (inspect.signature(f) for f in (operation.load(implementation), operation.reference))
    assert ours.parameters == theirs.parameters and operation.__doc__ == operation.reference.__doc__


def test_the_device_is_that_of_the_first_tensor():
    def where(*args):
        raise AssertionError("the reference was called")

    asked = []
    found = Operation(where)
    found.on = lambda device_type: asked.append(device_type) or (lambda *args: None)
    on_meta = torch.empty(1, device="meta")
    found(on_meta, torch.empty(1))
    found([(on_meta,)], torch.empty(1))
    found([], 3, torch.empty(1))
    found([], 3)
    dispatch._operations.remove(found)
    assert asked == ["meta", "meta", "cpu", ""]


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
from spectrumkv_kernels import tiered_attention
from spectrumkv_kernels.backend import dispatch
assert all(operation.on("cuda") is operation.reference for operation in dispatch.operations())
os.environ[dispatch.VARIABLE] = "triton"
try:
    tiered_attention.on("cuda")
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
        decode.on("cpu")
    message = str(raised.value)
    assert VARIABLE in message
    assert all(choice in message for choice in IMPLEMENTATIONS)


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
from spectrumkv_kernels import decode
from spectrumkv_kernels.backend import dispatch
print(all(operation.on("cuda") is operation.reference for _ in range(2) for operation in dispatch.operations()))
os.environ[dispatch.VARIABLE] = "triton"
try:
    decode.on("cuda")
except ImportError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    same, refusal = done.stdout.splitlines()
    assert same == "True"
    assert refusal.startswith("the triton implementation of decode can't be loaded: ")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("log: ")]
    assert line.startswith("log: WARNING SpectrumKV runs in plain torch, slower: kernels in Triton, for CUDA, can't be")


def test_a_repr_names_the_implementations():
    assert repr(tiered_attention) == "Operation(tiered_attention: torch, triton, cpp)"
