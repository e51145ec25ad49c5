"""The codec's Triton kernels against their twins and against float64: on a GPU, else in Triton's interpreter."""

import pytest
import torch
from reference import assert_one_byte_scales, error, frame_for, frequencies, rotated, rounding_bound, sylvester

from spectrumkv_kernels import CODECS, Quantized, Rotary, Segment, take, unpack
from spectrumkv_kernels.codec import reference as codec
from spectrumkv_kernels.codec.frame import split_frame
from spectrumkv_kernels.codec.quantize import ONE, saturated, unit

codec_triton = pytest.importorskip("spectrumkv_kernels.codec.triton_codec")
encode_triton = pytest.importorskip("spectrumkv_kernels.codec.triton_encode")
triton_rotary = pytest.importorskip("spectrumkv_kernels.rotation.triton_rotary")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASES = [  # keys' and values' head_dim, pairs, interleaved, bits, codec, dtype
    (64, 64, 32, False, 4, "spectrum", torch.float32),
    (64, 128, 16, True, 8, "spectrum", torch.bfloat16),
    (80, 96, 10, False, 4, "spectrum", torch.float32),
    (80, 80, 40, True, 2, "spectrum", torch.float16),
    (96, 64, 48, False, 8, "spectrum", torch.float32),
    (96, 80, 12, False, 2, "absmax", torch.float32),
    (128, 128, 64, False, 4, "spectrum", torch.bfloat16),
    (128, 128, 64, False, 8, "spectrum", torch.float32),
    (128, 64, 0, False, 2, "spectrum", torch.float32),
    (128, 128, 64, False, 4, "absmax", torch.float16),
    (256, 192, 128, False, 4, "spectrum", torch.float32),
    (256, 256, 64, True, 8, "absmax", torch.bfloat16),
    (192, 128, 32, True, 4, "spectrum", torch.float32),
    (8, 24, 3, False, 2, "spectrum", torch.float32),
    (10, 6, 5, True, 4, "spectrum", torch.float32),
    (2, 22, 1, False, 8, "spectrum", torch.float32),
    (128, 128, 64, False, 4, "spectrum2", torch.float32),
    (128, 64, 32, False, 3, "spectrum2", torch.bfloat16),
    (80, 48, 40, True, 2, "spectrum2", torch.float16),
    (96, 128, 12, False, 8, "spectrum2", torch.float32),
    (24, 40, 3, False, 3, "spectrum2", torch.float32),
    (10, 6, 5, True, 4, "spectrum2", torch.bfloat16),
    (64, 256, 0, False, 2, "spectrum2", torch.float32),
    (64, 40, 32, False, 3, "spectrum", torch.float32),
]


def name(case):
    key_dim, value_dim, pairs, interleaved, bits, codec_name, dtype = case
    pairing = "x" if interleaved else "h"
    return f"{key_dim}-{value_dim}-{pairs}{pairing}-int{bits}-{codec_name}-{str(dtype).removeprefix('torch.')}"


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=name)
SOME_CASES = pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 6, 9, 17, 18)], ids=name)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(batch, heads, tokens, n, seed=0):
    """Ascending indices of `n` tokens, others for every row and head: int64, a strided view as of a split."""
    noise = torch.rand(batch, heads, tokens, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., 1 : n + 1].sort(-1).values.repeat(1, 1, 2)[..., :n]


class Inputs:
    """Tokens of a tail, some of which go into a tier, and how they are coded."""

    def __init__(self, case, device, tokens=41, n=35, first=0):
        key_dim, value_dim, pairs, interleaved, self.bits, codec_name, dtype = case
        self.codec, self.rotary = CODECS[codec_name], Rotary(frequencies(pairs), interleaved)
        mean = 3 * randn(2, 2, key_dim, seed=1) if self.codec.center else None
        self.index, self.start = chosen(2, 2, tokens, n), first
        self.positions = (self.index + first).int()
        at = torch.arange(first, first + tokens).expand(2, 2, -1)
        keys = randn(2, 2, tokens, key_dim, seed=2)
        if mean is not None:
            keys = keys + rotated(self.rotary, mean.unsqueeze(-2).expand_as(keys), at)
        # Views of a buffer with capacity, and of a projection that is transposed.
        keys = torch.cat((keys, torch.full((2, 2, 7, key_dim), torch.nan)), dim=2).to(dtype)
        values = randn(2, tokens, 3, value_dim, seed=3).to(dtype)
        self.keys, self.values = keys.to(device)[:, :, :tokens], values.to(device).transpose(1, 2)
        self.mean = mean  # on the CPU
        frame = frame_for(self.codec, mean, value_dim)
        self.frame = None if frame is None else frame.to(device)
        self.index, self.positions = self.index.to(device), self.positions.to(device)

    def encode(self, implementation, **more):
        return implementation.encode(
            self.keys, self.values, self.positions, self.bits, self.codec, self.frame, self.rotary, self.start, **more
        )

    def decode(self, implementation, keys, values, positions=None):
        positions = self.positions if positions is None else positions
        return implementation.decode(keys, values, positions, self.bits, self.codec, self.frame, self.rotary)


def codes_of(quantized, bits):
    return torch.cat(unpack(quantized.codes, bits), dim=-1).int()


def assert_same_codes(ours, theirs, bits):
    """Equal but where float32 arithmetic falls on the other side of a tie: of codes, or of scales and zeros."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.codes.shape, a.codes.dtype) == (b.codes.shape, b.codes.dtype)
        assert (a.zero is None) == (b.zero is None)
        same = torch.ones_like(b.scale, dtype=torch.bool)
        assert a.affine.dtype == b.affine.dtype
        if b.affine.dtype == torch.uint8:
            assert_one_byte_scales(a, b, bits)
        for x, y in ((a.scale, b.scale), (a.zero, b.zero)):
            if y is not None:
                if y.dtype != torch.uint8:
                    torch.testing.assert_close(x, y, rtol=2.0**-10, atol=2.0**-24)
                same &= x == y
        assert (~same).sum() <= max(4, 0.02 * same.numel())
        differ = (codes_of(a, bits) - codes_of(b, bits))[same]
        assert differ.abs().max() <= 1
        assert differ.abs().sum() <= max(5, 1e-4 * differ.numel())


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, tuple):
            assert_equal(a, b)
        else:
            assert (a is b is None) or torch.equal(a, b)


@EVERY_CASE
def test_encode_and_decode_as_twin(case, device):
    inputs = Inputs(case, device)
    theirs = inputs.encode(codec)
    assert_same_codes(inputs.encode(encode_triton), theirs, inputs.bits)
    ours = inputs.decode(codec_triton, *theirs)
    for a, b in zip(ours, inputs.decode(codec, *theirs), strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("case", [CASES[7], CASES[16]], ids=name)
def test_few_codes_differ_from_the_twins(case, device):
    """Of float32 keys: those within float32 rounding of a tie."""
    inputs = Inputs(case, device, tokens=600, n=512)
    ours, theirs = (inputs.encode(implementation)[0] for implementation in (encode_triton, codec))
    same = (ours.affine == theirs.affine).all(-1)
    assert same.float().mean() > 0.98
    assert (codes_of(ours, inputs.bits) != codes_of(theirs, inputs.bits))[same].float().mean() < 1e-4


def assert_unbiased(original, result, bits):
    """float64 vectors as they are rounded, and what was restored of them, `[..., channels]`."""
    octave = 2.0 ** (1 / 32)
    if bits == 8:  # nothing is clipped
        scale = original.abs().amax(-1, keepdim=True) / 127.5 * octave
        assert bool(((result - original).abs() <= (0.5 + 1e-4) * scale).all())
        return
    along = (original * result).sum(-1) / original.square().sum(-1)
    assert bool(((along - 1).abs() <= octave**0.5 - 1 + 1e-4).all())
    assert error(result, original) < {4: 0.12, 3: 0.22, 2: 0.45}[bits]


@EVERY_CASE
def test_round_trip_within_rounding(case, device):
    """In the frame where rounding happens, each channel; at high positions."""
    inputs = Inputs(case, device, tokens=23, n=19, first=1_000_000)
    restored = inputs.decode(codec_triton, *inputs.encode(encode_triton))
    shift, value_mean, key_scale, value_scale = 0, 0, 1, 1
    if inputs.mean is not None:
        wide = inputs.mean.unsqueeze(-2).expand(-1, -1, 19, -1)
        shift = rotated(inputs.rotary, wide, inputs.positions.cpu())
    if inputs.codec.balanced:
        _, key_scale, value_mean, value_scale = (t.cpu().unsqueeze(-2) for t in split_frame(inputs.frame, case[0]))
    keys, values = (inputs.keys, restored[0], shift, key_scale), (inputs.values, restored[1], value_mean, value_scale)
    for given, result, center, scale in (keys, values):
        given, result = take(given, inputs.index).cpu().double(), result.cpu().double()
        frame = sylvester(given.shape[-1]) if inputs.codec.hadamard else torch.eye(given.shape[-1]).double()
        coded, decoded = ((x - center) / scale @ frame for x in (given, result))
        if inputs.codec.balanced:
            assert_unbiased(coded, decoded, inputs.bits)
            continue
        bound = rounding_bound(coded, inputs.bits, inputs.codec.symmetric) + 2e-6 * given.norm(dim=-1)
        assert bool(((decoded - coded).abs() <= bound.unsqueeze(-1)).all())


@SOME_CASES
def test_all_tokens_without_index(case, device):
    inputs = Inputs(case, device)
    expected = inputs.encode(encode_triton)
    inputs.keys, inputs.values = take(inputs.keys, inputs.index), take(inputs.values, inputs.index)
    inputs.start = None
    assert_equal(inputs.encode(encode_triton), expected)


@SOME_CASES
def test_no_tokens(case, device):
    inputs = Inputs(case, device, n=0)
    encoded = inputs.encode(encode_triton)
    assert encoded[0].codes.shape == (2, 2, 0, case[0] * case[4] // 8)
    assert inputs.decode(codec_triton, *encoded)[1].shape == (2, 2, 0, case[1])


def test_channels_that_are_not_contiguous(device):
    inputs = Inputs(CASES[0], device)
    expected = inputs.encode(encode_triton)
    inputs.keys, inputs.values = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (inputs.keys, inputs.values))
    assert_equal(inputs.encode(encode_triton), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ties_round_to_even(bits, device):
    """Without a transform and with a scale of 1, values are codes."""
    top = 2**bits - 1
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, top - 0.5, top - 1.5, top, 0]).expand(1, 1, 3, -1).contiguous().to(device)
    plain = codec.Codec("plain", center=False, hadamard=False, symmetric=False)
    positions = torch.arange(3, device=device, dtype=torch.int32).expand(1, 1, -1)
    ours, theirs = (i.encode(x, x, positions, bits, plain, None, Rotary()) for i in (encode_triton, codec))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("factor", [0.0, 1e-7, 1e-4, 1e5])
def test_constant_tiny_and_huge_vectors(factor, codec_name, device):
    """Scales and zeros beyond float16 saturate, those below it vanish."""
    x = factor * randn(1, 2, 5, 64)
    x[:, :, 0] = factor
    x = x.to(device)
    positions = torch.arange(5, device=device, dtype=torch.int32).expand(1, 2, -1)
    ours, theirs = (i.encode(x, x, positions, 8, CODECS[codec_name], None, Rotary()) for i in (encode_triton, codec))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.scale, b.scale, rtol=2.0**-10, atol=2.0**-24)
        assert a.zero is None or bool(a.zero.isfinite().all())
    pair = [i.decode(*ours, positions, 8, CODECS[codec_name], None, Rotary()) for i in (codec_triton, codec)]
    for a, b in zip(*pair, strict=True):  # what cancels out in the Hadamard sums is not exactly 0 on a GPU
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b[b.isfinite()].abs().max()))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("codec_name", CODECS)
def test_what_is_not_finite_is_not_represented(codec_name, bits, device):
    """Nor is what is beyond the largest scale; a vector of zeros is."""
    if bits < CODECS[codec_name].least_bits:
        pytest.skip("the codec has none")
    x = randn(1, 1, 7, 24)
    x[0, 0, 0, 5], x[0, 0, 1, 6], x[0, 0, 2, 7], x[0, 0, 4] = torch.nan, torch.inf, -torch.inf, 0.0
    x[0, 0, 3] *= 1e30
    positions = torch.arange(7, device=device, dtype=torch.int32).expand(1, 1, -1)
    given = (x.to(device), x.to(device), positions, bits, CODECS[codec_name], None, Rotary())
    ours, theirs = (implementation.encode(*given)[1] for implementation in (encode_triton, codec))
    assert saturated(ours).tolist() == [[[True] * 4 + [False] * 3]]
    assert torch.equal(saturated(ours), saturated(theirs))
    assert_same_codes([Quantized(*(t[:, :, 4:] for t in ours))], [Quantized(*(t[:, :, 4:] for t in theirs))], bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_one_byte_scale(bits, device):
    affine = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 256, 1)
    codes = torch.full((1, 1, 256, bits), 255, dtype=torch.uint8, device=device)  # 8 channels of the largest code
    positions = torch.arange(256, device=device, dtype=torch.int32).expand(1, 1, -1)
    plain = codec.Codec("plain", center=False, hadamard=False, symmetric=True, balanced=True)
    stored = Quantized(codes, affine)
    decoded, _ = codec_triton.decode(stored, stored, positions, bits, plain, None, Rotary())
    expected = (2 ** (bits - 1) - 0.5) * unit(bits) * 2 ** ((affine.double() - ONE) / 32)
    torch.testing.assert_close(decoded.double(), expected.expand(-1, -1, -1, 8), rtol=5e-7, atol=0)


@SOME_CASES
def test_a_token_is_bit_equal_in_any_company(case, device):
    inputs = Inputs(case, device, n=35)
    encoded = inputs.encode(encode_triton)
    whole = inputs.decode(codec_triton, *encoded)
    subset = chosen(2, 2, 35, 9, seed=5).to(device)
    k, v = (Quantized(*(None if t is None else take(t, subset) for t in stored)) for stored in encoded)
    part = inputs.decode(codec_triton, k, v, take(inputs.positions, subset))
    assert_equal(part, [take(t, subset) for t in whole])
    inputs.index, inputs.positions = take(inputs.index, subset), take(inputs.positions, subset)
    assert_equal(inputs.encode(encode_triton), (k, v))


@SOME_CASES
def test_negative_positions_count_as_0(case, device):
    """The first places of rows that have fewer tokens than others."""
    inputs = Inputs(case, device)
    inputs.keys, inputs.values = take(inputs.keys, inputs.index), take(inputs.values, inputs.index)
    inputs.positions[0, :, :3], inputs.start = -1, None
    theirs = inputs.encode(codec)
    assert_same_codes(inputs.encode(encode_triton), theirs, inputs.bits)
    pair = [inputs.decode(implementation, *theirs) for implementation in (codec_triton, codec)]
    assert all(error(a, b) < 1e-6 for a, b in zip(*pair, strict=True))


@SOME_CASES
def test_repeated_calls_are_bit_equal(case, device):
    inputs = Inputs(case, device)
    encoded = inputs.encode(encode_triton)
    decoded = inputs.decode(codec_triton, *encoded)
    for _ in range(20 if device.type == "cuda" else 1):
        assert_equal(inputs.encode(encode_triton), encoded)
        assert_equal(inputs.decode(codec_triton, *encoded), decoded)


def test_positions_are_not_read_by_the_host(monkeypatch, device):
    """As `Rotary.rotate` does, to size its table."""
    inputs = Inputs(CASES[0], device)
    monkeypatch.setattr(Rotary, "table", lambda *a: pytest.fail("a table whose length depends on positions"))
    inputs.decode(codec_triton, *inputs.encode(encode_triton))


@pytest.mark.parametrize("bits", [5, 16])
def test_errors_are_the_twins(bits, device):
    inputs = Inputs(CASES[0], device)
    inputs.bits = bits
    with pytest.raises(ValueError, match=rf"\b{bits}$"):
        inputs.encode(encode_triton)


def test_turns_cover_four_million_positions():
    frequency = torch.tensor(frequencies(16), dtype=torch.float64)
    step = triton_rotary.FINE.value
    table = triton_rotary.turns(Rotary(frequencies(16)), torch.device("cpu")).double()
    assert table.shape == (2 * step, 32)
    positions = torch.tensor([0, 1, step - 1, step, 123_456, 1_048_575, step**2 - 1])
    turns = torch.complex(*table.chunk(2, dim=-1))
    exact = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * frequency)
    assert bool(((turns[positions % step] * turns[step + positions // step] - exact).abs() < 2e-7).all())


def segments_of(case, device, counts, tail=9, empty=False):
    """Segments of `{bits: tokens}` and a tail, of 80 positions before the tail; the others were dropped."""
    inputs = Inputs(case, device, tokens=80, n=sum(counts.values()))
    order = torch.rand(2, 2, 80, generator=torch.Generator().manual_seed(3)).argsort(-1).to(device)
    segments = []
    for bits, index in zip(counts, order[..., : sum(counts.values())].split(list(counts.values()), -1), strict=True):
        inputs.index = index.sort(-1).values
        inputs.bits, positions = bits % 100, inputs.index.int()
        inputs.positions = positions
        if inputs.bits == 16:
            k, v = take(inputs.keys, inputs.index), take(inputs.values, inputs.index)
        else:
            k, v = inputs.encode(codec)
        if empty:
            positions = positions.clone()
            positions[0, :, :3] = -1
        segments.append(Segment(inputs.bits, k, v, positions))
    k, v = (randn(2, 2, tail + 5, d, seed=7).to(case[-1]).to(device)[:, :, :tail] for d in case[:2])
    positions = torch.arange(80, 80 + tail, dtype=torch.int32, device=device).expand(2, 2, -1)
    return [*segments, Segment(16, k, v, positions)], inputs


def assert_dense(case, segments, inputs, start, size, complete=False):
    rest = (start, size, case[-1], inputs.codec, inputs.frame, inputs.rotary, complete)
    ours, theirs = codec_triton.dense(segments, *rest), codec.dense(segments, *rest)
    where = torch.zeros(2, 2, size + 1, dtype=torch.int64, device=segments[0].positions.device)
    for segment in segments:
        slot = segment.positions.long() - start
        where.scatter_(2, slot.where((slot >= 0) & (slot < size), size), segment.bits)
    bits = where[..., :size]
    # Triton's interpreter cuts off to bfloat16 where a GPU rounds.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[case[-1]]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, case[-1])
        assert torch.equal(a[bits == 16], b[bits == 16])
        assert bool((a[bits == 0] == 0).all()) and bool(a.isfinite().all())
        coded = (bits != 0) & (bits != 16)
        torch.testing.assert_close(a[coded].float(), b[coded].float(), rtol=tolerance, atol=1e-5)
    return ours


@pytest.mark.parametrize("start", [0, 7, 80])
@SOME_CASES
def test_dense_with_dropped_tokens(case, start, device):
    segments, inputs = segments_of(case, device, {16: 5, 8: 11, 4: 33})
    assert_dense(case, segments, inputs, start, 89 - start)


@pytest.mark.parametrize("case", CASES[::2], ids=name)
def test_dense_where_every_position_has_a_token(case, device):
    segments, inputs = segments_of(case, device, {8: 47, 2 if case[0] % 4 == case[1] % 4 == 0 else 4: 33})
    first = assert_dense(case, segments, inputs, 0, 89, complete=True)
    assert_equal(assert_dense(case, segments, inputs, 0, 89), first)


@SOME_CASES
def test_dense_with_empty_places(case, device):
    segments, inputs = segments_of(case, device, {16: 20, 4: 33}, empty=True)
    assert_dense(case, segments, inputs, 0, 89)


@pytest.mark.parametrize(
    ("counts", "tail"),
    [
        ({16: 0, 8: 0, 4: 80}, 9),
        ({16: 3}, 0),
        ({}, 4),
        ({}, 0),
        ({2: 9, 4: 8, 8: 7, 104: 6, 108: 5, 16: 1, 102: 12}, 3),  # more than one launch takes
    ],
    ids=str,
)
def test_dense_of_unusual_tiers(counts, tail, device):
    segments, inputs = segments_of(CASES[0], device, counts, tail=tail)
    assert_dense(CASES[0], segments, inputs, 0, 80 + tail)


@pytest.mark.parametrize("case", [CASES[17], CASES[20]], ids=name)
def test_dense_of_all_widths(case, device):
    segments, inputs = segments_of(case, device, {16: 5, 8: 11, 4: 20, 3: 25, 2: 10}, empty=True)
    assert_dense(case, segments, inputs, 3, 80)


def test_dense_of_a_part_that_ends_early(device):
    segments, inputs = segments_of(CASES[0], device, {8: 30, 4: 50})
    assert_dense(CASES[0], segments, inputs, 11, 37)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles")
def test_lengths_compile_nothing_anew(device):
    def run(tokens, n):
        inputs = Inputs(CASES[6], device, tokens=tokens, n=n)
        encoded = inputs.encode(encode_triton)
        segment = Segment(4, *encoded, inputs.positions)
        codec_triton.dense([segment], 0, tokens, torch.bfloat16, inputs.codec, inputs.frame, inputs.rotary)

    def compiled():
        kernels = [codec_triton._dense_kernel, encode_triton._encode_kernel]
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(33, 17)
    before = compiled()
    assert before >= 2
    for tokens, n in ((64, 48), (65, 1), (128, 16), (700, 501)):
        run(tokens, n)
    assert compiled() == before
