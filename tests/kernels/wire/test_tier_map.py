"""Tier maps: packed and back, and the positions of each tier by all twins, against lists of Python's integers."""

import pytest
import torch

from spectrumkv_kernels import tier_positions
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.wire import tier_map
from spectrumkv_kernels.wire.tier_map import map_bits, map_width, pack_map, unpack_map

CPU = torch.device("cpu")
TOKENS = [1, 2, 3, 4, 5, 7, 8, 63, 64, 301]

needs_compiler = pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")


@pytest.fixture(params=["torch", "device", pytest.param("cpp", marks=needs_compiler)])
def twin(request, monkeypatch):
    """Each implementation; `device` is how a GPU does it, here on the CPU."""
    monkeypatch.setenv(VARIABLE, "torch" if request.param == "device" else request.param)
    function = tier_positions.on("cpu")
    if request.param != "device":
        return function

    def as_on_a_device(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
            return function(*args)

    return as_on_a_device


def code_at(line, i, bits):
    per_byte = 8 // bits
    return line[i // per_byte] >> bits * (i % per_byte) & 2**bits - 1


def expected(packed, tokens, sizes, start, bits):
    """As the docstring words it: positions, and counts."""
    positions = [[] for _ in sizes]
    counts = []
    for line in packed.flatten(0, 1).tolist():
        codes = [code_at(line, i, bits) for i in range(tokens)]
        counts.append([codes.count(code) for code in range(2**bits)])
        for code, size in enumerate(sizes):
            held = [start + i for i, c in enumerate(codes) if c == code][:size]
            positions[code].append([-1] * (size - len(held)) + held)
    return positions, counts


def assert_equals_its_description(twin, packed, tokens, sizes, start=0, bits=2):
    found, counts = twin(packed, tokens, sizes, start, bits)
    positions, numbers = expected(packed, tokens, sizes, start, bits)
    rows = packed.shape[:2]
    assert counts.dtype == torch.int64 and counts.shape == (*rows, 2**bits)
    assert counts.flatten(0, 1).tolist() == numbers
    assert [t.shape for t in found] == [(*rows, size) for size in sizes]
    for tensor, lines in zip(found, positions, strict=True):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert tensor.flatten(0, 1).tolist() == lines


def codes_with(counts, batch, heads, seed):
    """Codes `[batch, heads, tokens]`, in each row as many of each as `counts` says, in another order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.arange(len(counts), dtype=torch.uint8).repeat_interleave(torch.tensor(counts))
    rows = [codes[torch.randperm(len(codes), generator=generator)] for _ in range(batch * heads)]
    return torch.stack(rows).view(batch, heads, -1)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tiers", [1, 2, 3, 4, 5, 15])
def test_counts_that_are_the_same_in_all_rows(twin, tokens, tiers):
    counts = torch.randint(0, tiers, (tokens,), generator=torch.Generator().manual_seed(tokens)).bincount(
        minlength=tiers
    )
    bits = map_bits(tiers)
    packed = pack_map(codes_with(counts.tolist(), 2, 3, tokens), bits)
    assert_equals_its_description(twin, packed, tokens, counts.tolist(), start=1000, bits=bits)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("tiers", "bits"), [(1, 2), (2, 2), (3, 2), (4, 2), (1, 4), (5, 4), (16, 4)])
def test_any_bytes(twin, tokens, tiers, bits):
    """Rows with more and fewer tokens than places, dropped ones, padding that is not 0."""
    generator = torch.Generator().manual_seed(tokens)
    packed = torch.randint(0, 256, (3, 2, map_width(tokens, bits)), dtype=torch.uint8, generator=generator)
    for factor in (0, 1, 2, 3, 5):
        sizes = [min((factor + i) * tokens // 8, 5 * tokens) for i in range(tiers)]
        assert_equals_its_description(twin, packed, tokens, sizes, start=5, bits=bits)


@pytest.mark.parametrize("tokens", [1, 5, 64, 301])
@pytest.mark.parametrize(
    ("code", "bits"), [*((code, 2) for code in range(4)), *((code, 4) for code in (0, 1, 4, 5, 15))]
)
def test_one_code_alone(twin, tokens, code, bits):
    packed = pack_map(torch.full((1, 2, tokens), code, dtype=torch.uint8), bits)
    for size in (0, 1, tokens - 1, tokens, tokens + 1, tokens + 9):
        assert_equals_its_description(twin, packed, tokens, [size] * (2**bits - 1), bits=bits)


def test_every_byte(twin):
    packed = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    assert_equals_its_description(twin, packed, 1024, [256, 256, 256, 256])
    for last in range(1, 4):  # tokens of the last byte that count
        assert_equals_its_description(twin, packed.view(256, 1, 1), last, [4, 1, 0, 3])
    assert_equals_its_description(twin, packed, 512, [32, 40, 0, 31, 32], bits=4)
    assert_equals_its_description(twin, packed.view(256, 1, 1), 1, [1, 0, 2], bits=4)


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (0, 0)])
def test_no_rows(twin, batch, heads):
    assert_equals_its_description(twin, torch.empty(batch, heads, 3, dtype=torch.uint8), 9, [4, 5])


def test_in_the_midst_of_other_memory(twin):
    """On any alignment, with strides, and up to the largest positions that a cache has."""
    around = torch.randint(0, 256, (3, 4, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert_equals_its_description(twin, around[1:, ::2, 3:29], 102, [20, 25, 30], start=(1 << 24) - 102)
    assert_equals_its_description(twin, around[1:2, 1:2, 5:6].expand(2, 3, -1), 3, [1, 1])
    assert_equals_its_description(twin, around[1:, ::2, 3:29], 51, [3, 4, 5, 6, 7], start=(1 << 24) - 51, bits=4)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 8, 3969), (2, 1, 1000)])
@pytest.mark.parametrize("tiers", [3, 5])
def test_twins_at_the_sizes_of_caches(monkeypatch, shape, tiers):
    codes = torch.randint(0, tiers, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    sizes = [int((codes == code).sum(-1).amax()) for code in range(tiers)]
    bits = map_bits(tiers)
    monkeypatch.setenv(VARIABLE, "cpp")
    ours, counts = tier_positions.on("cpu")(pack_map(codes, bits), shape[2], sizes, 4, bits)
    theirs, numbers = tier_map.tier_positions(pack_map(codes, bits), shape[2], sizes, 4, bits)
    assert torch.equal(counts, numbers) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 300])
@pytest.mark.parametrize("bits", [2, 4])
def test_tier_maps_are_packed_and_back(tokens, bits):
    codes = torch.randint(0, 2**bits, (2, 3, tokens), dtype=torch.uint8)
    packed = pack_map(codes, bits)
    assert packed.shape == (2, 3, -(-tokens // (8 // bits))) == (2, 3, map_width(tokens, bits))
    codes_and_padding = unpack_map(packed, bits)
    assert torch.equal(codes_and_padding[..., :tokens], codes)
    assert not codes_and_padding[..., tokens:].any()
    assert [code_at(packed[0, 0].tolist(), i, bits) for i in range(tokens)] == codes[0, 0].tolist()


def test_bits_leave_a_code_for_tokens_of_no_tier():
    assert [map_bits(tiers) for tiers in range(7)] == [2, 2, 2, 2, 4, 4, 4]
