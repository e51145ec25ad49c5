"""The flaws of affine pairs: all twins, against the docstring's words in Python."""

import math

import pytest
import torch

from spectrumkv_kernels import affine_flaws
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.wire.affine import NEGATIVE, NOT_FINITE, SOUND

CPU = torch.device("cpu")
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 300]
BAD = [math.nan, -math.nan, math.inf, -math.inf]

needs_compiler = pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")


@pytest.fixture(params=["torch", pytest.param("cpp", marks=needs_compiler)])
def twin(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return affine_flaws.on("cpu")


@pytest.fixture(params=[1, 2])
def width(request):
    return request.param


def sound(size, width, seed=0):
    """Scales from 0 on, zeros of either sign, denormal and greatest numbers among them."""
    numbers = torch.randn(2, size, width, generator=torch.Generator().manual_seed(seed)) * 1e-4
    numbers[..., 0].abs_()
    numbers.view(-1)[: 3 * width : width] = torch.tensor([0.0, 6e-8, 65504.0])[: numbers.numel() // width]
    return numbers.half()


@pytest.mark.parametrize("size", SIZES)
def test_every_place(twin, width, size):
    given = sound(size, width)
    flat = given.view(-1)
    assert twin([given]) == [SOUND]
    for place in range(flat.numel()):
        before = flat[place].clone()
        for value in (*BAD, -6e-8, -1.0, -65504.0, -0.0, 65504.0):
            flat[place] = value
            scale = place % width == 0
            flaw = NOT_FINITE if not math.isfinite(value) else NEGATIVE if value < 0 and scale else SOUND
            assert twin([given]) == [flaw]
            if size > 64:
                break
        flat[place] = before


def test_what_comes_first(twin, width):
    given = sound(50, width)
    given[0, 3, 0], given[1, 40, -1] = -1, math.nan
    assert twin([given]) == [NOT_FINITE]


def test_several_tensors(twin):
    good, negative, infinite = sound(9, 2), sound(70, 2), sound(5, 1)
    negative[1, 69, 0], infinite[0, 0, 0] = -1, math.inf
    empty = torch.empty(0, 4, 2, dtype=torch.float16)
    assert twin([good, negative, empty, infinite, good]) == [SOUND, NEGATIVE, SOUND, NOT_FINITE, SOUND]
    assert twin([]) == []


@pytest.mark.parametrize("offset", range(4))
def test_in_the_midst_of_other_memory(twin, width, offset):
    around = torch.full((200,), math.nan, dtype=torch.float16)
    given = around[offset:][: 66 * width].view(1, 66, width)
    given.copy_(sound(33, width).view(1, 66, width))
    assert twin([given]) == [SOUND]
    given[0, 65, 0] = -1
    assert twin([given]) == [NEGATIVE]
