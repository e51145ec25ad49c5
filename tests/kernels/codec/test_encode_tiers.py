"""Tokens stored in all tiers at once, in plain PyTorch and in Triton."""

import pytest
import torch
from reference import frame_for, frequencies
from test_codec_triton import assert_same_codes

from spectrumkv_kernels import CODECS, Quantized, Rotary, Segment, take
from spectrumkv_kernels.codec import reference
from spectrumkv_kernels.segment import can_pack, pack_positions, unpack_positions

encode_triton = pytest.importorskip("spectrumkv_kernels.codec.triton_encode")

BOTH = pytest.mark.parametrize("implementation", [reference, encode_triton], ids=["torch", "triton"])
TIERS = pytest.mark.parametrize(
    ("codec", "dims", "dtype", "tiers"),
    [
        ("spectrum", (64, 64), torch.bfloat16, {16: 5, 8: 20, 4: 66}),
        ("absmax", (80, 48), torch.float16, {16: 0, 8: 33, 4: 0}),
        ("spectrum2", (128, 128), torch.float32, {16: 4, 8: 1, 4: 64, 3: 18, 2: 20}),
        ("spectrum2", (24, 40), torch.bfloat16, {16: 30, 8: 0, 4: 18, 2: 0}),
        ("spectrum", (10, 6), torch.float32, {16: 7}),
    ],
)
START = 1000


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Inputs:
    """Tokens of a tail with their tiers; six of them go into none."""

    def __init__(self, codec, dims, dtype, tiers, device):
        self.codec, self.bits, self.counts = CODECS[codec], list(tiers), list(tiers.values())
        self.rotary = Rotary(frequencies(dims[0] // 4))
        tokens = sum(self.counts) + 6
        # Views of a buffer with capacity, and of a projection that is transposed.
        self.keys = torch.cat((randn(2, 2, tokens, dims[0]), torch.full((2, 2, 9, dims[0]), torch.nan)), dim=2)
        self.keys = self.keys.to(dtype).to(device)[:, :, :tokens]
        self.values = randn(2, tokens, 2, dims[1], seed=1).to(dtype).to(device).transpose(1, 2)
        mean = randn(2, 2, dims[0], seed=2) if self.codec.center else None
        frame = frame_for(self.codec, mean, dims[1])
        self.frame = None if frame is None else frame.to(device)
        mixed = torch.rand(2, 2, tokens, generator=torch.Generator().manual_seed(3)).argsort(-1)
        parts = mixed.split([*self.counts, 6], dim=-1)
        self.order = (torch.cat([part.sort(-1).values for part in parts], dim=-1) + START).int().to(device)
        self.flags = torch.zeros(1 + len(tiers), dtype=torch.bool, device=device)

    def store(self, implementation, out=None, packs=None, start=START):
        none = [None] * len(self.bits)
        return implementation.encode_tiers(
            self.keys, self.values, self.order, self.counts, self.bits, self.codec, self.frame, self.rotary, start,
            self.flags, none if out is None else out, [False] * len(none) if packs is None else packs,
        )  # fmt: skip

    def parts(self):
        return self.order.split([*self.counts, 6], dim=-1)


def room_for(segment, device):
    """A segment's tensors in the middle of longer ones, which are returned too."""

    def within(tensor):
        whole = torch.full((2, 2, 30 + tensor.shape[2], *tensor.shape[3:]), 77, dtype=tensor.dtype, device=device)
        wholes.append(whole)
        return whole[:, :, 20 : 20 + tensor.shape[2]]

    wholes = []
    sides = (s if isinstance(s, torch.Tensor) else tuple(s) for s in (segment.keys, segment.values))
    sides = [within(s) if isinstance(s, torch.Tensor) else Quantized(*map(within, s)) for s in sides]
    return Segment(segment.bits, *sides, within(segment.positions)), wholes


@TIERS
@BOTH
def test_every_tier_has_its_tokens(codec, dims, dtype, tiers, implementation, device):
    """By the definition: what `encode` makes of a tier's tokens, and copies of exact ones."""
    inputs = Inputs(codec, dims, dtype, tiers, device)
    stored = inputs.store(implementation)
    assert [segment.bits for segment in stored] == inputs.bits
    single = reference if implementation is reference else encode_triton
    for segment, part in zip(stored, inputs.parts(), strict=False):
        assert torch.equal(segment.positions, part)
        index = part.long() - START
        given = [take(side, index) for side in (inputs.keys, inputs.values)]
        if segment.bits == 16:
            expected = Segment(16, *given, part)
        else:
            fields = segment.bits, inputs.codec, inputs.frame, inputs.rotary
            expected = Segment(segment.bits, *single.encode(*given, part.contiguous(), *fields), part)
        assert_same(segment, expected)
    assert not inputs.flags.any()


def assert_same(segment, expected):
    """Bit by bit in PyTorch and in the interpreter; compiled for other tiers arithmetic may be contracted otherwise."""
    if segment.bits < 16 and segment.positions.is_cuda and segment.tokens:
        sides = ((segment.keys, segment.values), (expected.keys, expected.values))
        assert_same_codes(*sides, segment.bits)
        return
    for ours, theirs in zip(segment.tensors(), expected.tensors(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@TIERS
@BOTH
def test_tokens_are_written_where_they_belong(codec, dims, dtype, tiers, implementation, device):
    """Into the middle of rooms that have more places, and of which nothing else changes."""
    inputs = Inputs(codec, dims, dtype, tiers, device)
    expected = inputs.store(implementation)
    rooms, wholes = zip(*(room_for(segment, device) for segment in expected), strict=True)
    some = [None if i == 1 else room for i, room in enumerate(rooms)]  # one tier has none
    got = inputs.store(implementation, out=some)
    for i, (segment, right) in enumerate(zip(got, expected, strict=True)):
        assert_same(segment, right)
        for whole, part in zip(wholes[i], segment.tensors(), strict=True):
            before = torch.full_like(whole, 77)
            if i != 1:
                before[:, :, 20 : 20 + part.shape[2]] = part
            assert torch.equal(whole, before)


def test_rows_in_another_order(device):
    inputs = Inputs("spectrum", (64, 64), torch.float32, {16: 5, 8: 20, 4: 71}, device)
    expected = inputs.store(encode_triton)

    def turned(tensor):
        return torch.empty_like(tensor.transpose(0, 1)).transpose(0, 1)

    out = []
    for segment in expected:
        sides = (s if isinstance(s, torch.Tensor) else tuple(s) for s in (segment.keys, segment.values))
        sides = [turned(s) if isinstance(s, torch.Tensor) else Quantized(*map(turned, s)) for s in sides]
        out.append(Segment(segment.bits, *sides, turned(segment.positions)))
    for segment, right, there in zip(inputs.store(encode_triton, out), expected, out, strict=True):
        for ours, theirs, own in zip(segment.tensors(), right.tensors(), there.tensors(), strict=True):
            assert ours is own
            assert ours.dtype != torch.uint8 or (ours.int() - theirs.int()).abs().max() <= 1  # the twin's rounding


@TIERS
@BOTH
def test_positions_are_packed(codec, dims, dtype, tiers, implementation, device):
    inputs = Inputs(codec, dims, dtype, tiers, device)
    packs = [bits < 16 for bits in tiers]
    stored = inputs.store(implementation, packs=packs)
    for segment, part, packed in zip(stored, inputs.parts(), packs, strict=False):
        assert segment.packed == packed
        if packed:
            assert torch.equal(segment.positions, pack_positions(part))
            assert torch.equal(unpack_positions(segment.positions, part.shape[-1]), part)
        else:
            assert torch.equal(segment.positions, part)
    assert not inputs.flags.any()


@pytest.mark.parametrize("spoilt", ["step", "tile", "none"])
@BOTH
def test_positions_that_cannot_be_packed_are_told(spoilt, implementation, device):
    inputs = Inputs("spectrum2", (8, 8), torch.float32, {16: 4, 8: 70, 4: 80}, device)
    inputs.keys, inputs.values = (side.repeat(1, 1, 4, 1) for side in (inputs.keys, inputs.values))
    tier = inputs.order[1, 1, 4:74]
    tier[:] = START + torch.arange(70, device=device)
    if spoilt == "step":
        tier[60:] += 256  # 257 from its neighbour, within a tile
    elif spoilt == "tile":
        tier[64:] += 256  # at the beginning of a tile any step fits
    else:
        tier[0] = START - 1  # a place without a token has -1: nothing is packed from below 0 on
        inputs.order -= START
        inputs.keys, inputs.values = (torch.roll(side, 1, 2)[:, :, 1:] for side in (inputs.keys, inputs.values))
    start = 0 if spoilt == "none" else START
    assert bool(can_pack(inputs.order[..., 4:74])) == (spoilt == "tile")
    if spoilt == "none" and implementation is reference:
        pytest.skip("PyTorch has no token before the first")
    inputs.store(implementation, packs=[False, True, True], start=start)
    assert inputs.flags.tolist()[1:] == [False, spoilt != "tile", False]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("codec", ["spectrum2", "absmax"])
@BOTH
def test_what_no_code_stands_for_is_told(codec, implementation, side, device):
    inputs = Inputs(codec, (16, 8), torch.float32, {16: 3, 8: 4, 4: 5, 2: 6}, device)
    states = getattr(inputs, side).clone()
    setattr(inputs, side, states)
    edges = [0, *torch.tensor(inputs.counts).cumsum(0).tolist(), inputs.order.shape[-1]]
    numbers = torch.nan, torch.inf, -torch.inf, 3e38, torch.nan
    for bits, number, first, last in zip([*inputs.bits, 0], numbers, edges, edges[1:], strict=False):
        token = int(inputs.order[1, 0, last - 1 if bits % 3 else first]) - START
        before = states[1, 0, token, 1].clone()
        states[1, 0, token, 1] = number
        inputs.flags.zero_()
        inputs.store(implementation)
        assert inputs.flags.tolist() == [0 < bits < 16, *[False] * 4]  # what is exact or dropped is not lost
        states[1, 0, token, 1] = before
