"""What Python hands over to C++ is laid out as C++ takes it: structures' names, fields, and sizes."""

import ctypes
import logging
import re
from pathlib import Path

import pytest
import torch

from spectrumkv_kernels import affine_flaws
from spectrumkv_kernels.attention import cpp as cpp_attention
from spectrumkv_kernels.backend import build_cpp, dispatch
from spectrumkv_kernels.wire import cpp_affine, cpp_checksum, cpp_tier_map

MODULES = {
    "attention.cpp": cpp_attention,
    "affine.cpp": cpp_affine,
    "checksum.cpp": cpp_checksum,
    "tier_map.cpp": cpp_tier_map,
}
NUMBERS = {"Int": ctypes.c_int64, "float": ctypes.c_float}
needs_compiler = pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")


def structures(module):
    return {
        name: value for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure)
    }  # fmt: skip


def declared(source, name):
    """`(name, type)` of each field of a structure of a C++ source, in order; `*` for pointers."""
    body = re.search(rf"^struct {name} {{(.*?)^}};", source, re.MULTILINE | re.DOTALL).group(1)
    body = re.sub(r"//.*", "", body).split("{")[0].rpartition(";")[0]  # up to the first method
    for declaration in body.split(";"):
        kind, *names = re.match(r"\s*(?:const\s+)?(\w+)(.*)", declaration, re.DOTALL).groups()
        for given in "".join(names).split(","):
            yield re.sub(r"\[\w+\]|\*|const", "", given).strip(), "*" if "*" in given else kind


def kind_of(field, names):
    if hasattr(field, "_length_"):
        field = field._type_
    if field is ctypes.c_void_p or (hasattr(field, "contents") and issubclass(field, ctypes._Pointer)):
        return "*"
    found = {kind: name for name, kind in NUMBERS.items()} | {kind: name for name, kind in names.items()}
    return found[field]


@pytest.mark.parametrize("file", MODULES)
def test_fields_are_those_of_the_source_in_its_order(file):
    module = MODULES[file]
    source = Path(module.__file__).with_name(file).read_text()
    ours = structures(module)
    assert ours
    for name, structure in ours.items():
        fields = [(field, kind_of(kind, ours)) for field, kind in structure._fields_]
        assert fields == list(declared(source, name)), name
        assert f"Int size_of_{name}() {{ return sizeof({name}); }}" in source  # what `load` compares with


@needs_compiler
@pytest.mark.parametrize("file", MODULES)
def test_all_structures_are_compared(file, monkeypatch):
    compared, real = [], build_cpp.load
    monkeypatch.setattr(
        build_cpp, "load", lambda source, functions, given: compared.extend(given) or real(source, functions, given)
    )
    MODULES[file].library.__wrapped__()
    assert {structure.__name__ for structure in compared} == set(structures(MODULES[file]))


@needs_compiler
@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_another_size_is_refused_and_torch_takes_over(change, monkeypatch, caplog):
    fields = cpp_affine.Affine._fields_
    fields = [*fields, ("more", ctypes.c_int64)] if change == "longer" else fields[:-1]
    other = type("Affine", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(cpp_affine, "Affine", other)
    monkeypatch.setattr(build_cpp, "_tried", build_cpp._Tried())
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    cpp_affine.library.cache_clear()
    dispatch.forget()
    size = 32 if change == "longer" else 16
    sentence = f"affine.cpp takes the structure Affine in 24 bytes, not in {size}"
    try:
        with caplog.at_level(logging.WARNING):
            assert affine_flaws([torch.tensor([[1.0, torch.nan]]).half()]) == [1]
        (line,) = caplog.messages
        assert line.startswith("SpectrumKV runs in plain torch, slower: kernels in C++, for the CPU, can't be used (")
        assert sentence in line
        assert affine_flaws.on("cpu") is affine_flaws.reference
    finally:
        monkeypatch.undo()
        cpp_affine.library.cache_clear()
        dispatch.forget()
