import itertools
from typing import NamedTuple

import pytest
import torch
from reference import error, frame_for, frequencies, rotated

from spectrumkv_kernels import CODECS, Codec, Quantized, Rotary, Segment, tiered_attention
from spectrumkv_kernels.attention import cpp as attention_cpp
from spectrumkv_kernels.attention import reference as attention
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.codec.reference import decode, dense, encode
from spectrumkv_kernels.rotation.rotary import LARGEST_TABLE
from spectrumkv_kernels.segment import pack_positions

ALL_TIERS = ((16, 5), (8, 7), (4, 11), (2, 3), (16, 4))
ALL_WIDTHS = (*ALL_TIERS, (3, 9), (1, 6))
CODEC = {
    **CODECS,
    "rotated": Codec("rotated", center=False, hadamard=True, symmetric=False),
    "centred": Codec("centred", center=True, hadamard=False, symmetric=False),
}


@pytest.fixture(autouse=True, params=["torch", "cpp"])
def implementation(request, monkeypatch):
    """Every test runs with both."""
    if request.param == "cpp":
        use_cpp(monkeypatch)
    else:
        monkeypatch.setenv(VARIABLE, "torch")
    return request.param


def use_cpp(monkeypatch):
    """Reads are those of `attention_cpp`, not one of which goes to the twin in torch."""
    if not build_cpp.compilers():
        pytest.skip("no C++ compiler")

    def twin(*args, **options):
        raise AssertionError("went to the twin")

    attention_cpp.library()
    monkeypatch.setattr(attention, "tiered_attention", twin)
    monkeypatch.setenv(VARIABLE, "cpp")


class Case(NamedTuple):
    """Tokens in tiers, and how they are coded."""

    segments: list
    length: int
    codec: Codec
    frame: torch.Tensor | None
    rotary: Rotary
    ragged: bool

    def decoded(self):
        """float64 keys and values of each segment, and the positions."""
        for bits, keys, values, positions in self.segments:
            if isinstance(keys, Quantized):
                keys, values = decode(keys, values, positions, bits, self.codec, self.frame, self.rotary)
            yield keys.double(), values.double(), positions.long()

    def attend(self, query, **options):
        fields = {"length": self.length, "codec": self.codec, "frame": self.frame, "rotary": self.rotary}
        attend = tiered_attention
        return attend(query, self.segments, **fields, ragged=self.ragged, **options)

    def expected(self, query, *, scale, mask=None, window=None, softcap=None, sinks=None):
        """Plain attention over the dequantised tokens, query by query."""
        batch, heads, queries, _ = query.shape
        group = heads // self.segments[0].positions.shape[1]
        decoded, out = list(self.decoded()), []
        for row, head in itertools.product(range(batch), range(heads)):
            keys, values, positions = in_order(decoded, row, head // group)
            for i in range(queries):
                scores = keys @ query[row, head, i].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                at = self.length - queries + i
                if mask is None:
                    seen = (positions <= at) & (positions > at - (window or self.length + 1))
                else:
                    columns = positions - (self.length - mask.shape[-1])
                    entries = mask[row % len(mask), head % mask.shape[1], i][columns.clamp(min=0)]
                    if mask.dtype != torch.bool:
                        scores, entries = scores + entries.double(), entries > torch.finfo(mask.dtype).min / 2
                    seen = (columns >= 0) & entries
                logits = scores[seen]
                if sinks is not None:
                    logits = torch.cat((logits, sinks[head].double()[None]))
                p = torch.softmax(logits, dim=0)[: int(seen.sum())]
                out.append(p @ values[seen])
        return torch.stack(out).view(batch, heads, queries, -1)


def in_order(decoded, row, head):
    """Keys, values and positions of a row and head, ascending."""
    parts = [[t[row, head][positions[row, head] >= 0] for t in (k, v, positions)] for k, v, positions in decoded]
    keys, values, positions = (torch.cat(part) for part in zip(*parts, strict=True))
    order = positions.argsort()
    return keys[order], values[order], positions[order]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(
    tiers=ALL_TIERS,
    *,
    codec="spectrum",
    batch=1,
    kv_heads=2,
    head_dim=16,
    value_dim=None,
    dropped=0,
    fillers=False,
    dtype=torch.float32,
    interleaved=False,
    seed=0,
):
    """Tokens scattered over `tiers`, pairs of bits and count, in another way for every row and head.

    `dropped` positions are nowhere. With `fillers`, up to 2 places of each row, head and tier are empty. Tiers for
    which the codec has no codes are left out.
    """
    codec, rotary = CODEC[codec], Rotary(frequencies(head_dim // 2 - head_dim // 8), interleaved)
    tiers = [(bits, count) for bits, count in tiers if bits >= codec.least_bits]
    mean = randn(batch, kv_heads, head_dim, seed=seed + 1)
    frame = frame_for(codec, mean, value_dim or head_dim, seed)
    length = sum(count for _, count in tiers) + dropped
    shuffled = torch.rand(batch, kv_heads, length, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    segments, start = [], 0
    for i, (bits, count) in enumerate(tiers):
        positions = shuffled[..., start : start + count].sort(-1).values.to(torch.int32)
        start += count
        keys = randn(batch, kv_heads, count, head_dim, seed=seed + 10 + i) + mean.unsqueeze(-2)
        keys = rotated(rotary, keys, positions).to(dtype)
        values = randn(batch, kv_heads, count, value_dim or head_dim, seed=seed + 20 + i).to(dtype)
        if bits < 16:
            keys, values = encode(keys, values, positions, bits, codec, frame, rotary)
        segment = Segment(bits, keys, values, positions)
        segments.append(with_fillers(segment, seed + i) if fillers and count else segment)
    return Case(segments, length, codec, frame, rotary, fillers)


def packed(case):
    """The case with packed positions in its tiers of codes, all of which can be."""
    segments = [s if s.bits == 16 else s._replace(positions=pack_positions(s.positions)) for s in case.segments]
    assert any(s.packed for s in segments)
    return case._replace(segments=[Segment(*s) for s in segments])


PACKED_CASES = {
    "one query": {},
    "several": {"queries": 3},
    "window": {"queries": 2, "window": 100},
    "mask": {"queries": 2, "columns": 290, "mask": True},
    "sinks": {"sinks": True, "softcap": 5.0},
}


def packed_case(name, **options):
    """Two cases, plain and packed, a query and what goes with it; tiles are full, and not."""
    more = dict(PACKED_CASES[name])
    tiers = ((16, 5), (8, 64), (4, 131), (3, 70), (2, 20))
    case = build(tiers, codec="spectrum2", batch=2, head_dim=options.pop("head_dim", 32), **options)
    heads, dim = 4, case.segments[0].keys.shape[-1]
    query = randn(2, heads, more.pop("queries", 1), dim, seed=8)
    if more.pop("mask", False):
        seen = torch.rand(2, 1, query.shape[2], more.pop("columns"), generator=torch.Generator().manual_seed(1)) < 0.7
        more["mask"] = seen
    if more.pop("sinks", False):
        more["sinks"] = randn(heads, seed=9)
    return case, packed(case), query, {"scale": 0.3, **more}


@pytest.mark.parametrize("name", PACKED_CASES)
def test_packed_positions(name):
    plain, tiled, query, options = packed_case(name)
    out = tiled.attend(query, **options)
    assert torch.equal(out, plain.attend(query, **options))
    assert error(out, plain.expected(query, **options)) < 1e-5
    dense_fields = (torch.float32, plain.codec, plain.frame, plain.rotary)
    for a, b in zip(*(dense(c.segments, 3, c.length - 3, *dense_fields) for c in (plain, tiled)), strict=True):
        assert torch.equal(a, b)


def with_fillers(segment, seed):
    """`segment` with 0 to 2 first places of each row and head, the token of which is taken out, holding garbage."""
    bits, keys, values, positions = segment
    batch, heads, count = positions.shape
    empty = (torch.arange(batch * heads).view(batch, heads, 1) + seed) % 3
    filler = torch.arange(count) < empty

    def garbage(t, value):
        return t.masked_fill(filler.unsqueeze(-1) if t.dim() == 4 else filler, value)

    def spoilt(stored, large):
        """What lies in an empty place was a token once: finite, though maybe far larger than the others."""
        if not isinstance(stored, Quantized):
            return garbage(stored, large)
        values = (250,) if stored.affine.dtype == torch.uint8 else (300.0, -large)
        spoilt = [garbage(t, value) for t, value in zip(stored.affine.unbind(-1), values, strict=False)]
        return Quantized(garbage(stored.codes, 0xA7), torch.stack(spoilt, dim=-1))

    return Segment(bits, spoilt(keys, 1e4), spoilt(values, -2e4), positions.masked_fill(filler, -1))


def check(case, query, tolerance=1e-5, **options):
    scale = query.shape[-1] ** -0.5 * 1.3
    out, expected = case.attend(query, scale=scale, **options), case.expected(query, scale=scale, **options)
    assert out.dtype == query.dtype
    assert error(out, expected) < tolerance
    return out


def causal(queries, length, batch=1, pads=()):
    """bool `[batch, 1, queries, length]`, rows starting with as many hidden columns as `pads` says."""
    mask = torch.ones(batch, 1, queries, length, dtype=torch.bool).tril(length - queries)
    for row, count in enumerate(pads):
        mask[row, ..., :count] = False
    return mask


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


TIER_SETS = [c for n in (1, 2, 3, 4) for c in itertools.combinations(((16, 5), (8, 7), (4, 11), (2, 3)), n)]


@pytest.mark.parametrize("codec", CODEC)
@pytest.mark.parametrize("tiers", TIER_SETS, ids=lambda tiers: "+".join(str(bits) for bits, _ in tiers))
def test_tier_combinations(tiers, codec):
    case = build(tiers, codec=codec, batch=2)
    check(case, randn(2, 4, 1, 16, seed=5))
    check(case, randn(2, 4, 2, 16, seed=6))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("empty", [16, 8, 4, 3, 2, 1])
def test_empty_segments(empty, codec):
    tiers = [(bits, 0 if bits == empty else count) for bits, count in ALL_WIDTHS]
    check(build(tiers, codec=codec), randn(1, 4, 3, 16))


@pytest.mark.parametrize("bits", [3, 1])
@pytest.mark.parametrize("codec", CODEC)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 128, 136, 200])
def test_codes_of_three_bits_and_one(head_dim, codec, bits):
    """Head dims of which an eighth is more and less than vectors hold."""
    if bits < CODEC[codec].least_bits:
        pytest.skip("the codec has none")
    case = build(((bits, 37),), codec=codec, head_dim=head_dim, batch=2)
    check(case, randn(2, 6, 1, head_dim, seed=3), 3e-6)
    check(build(ALL_WIDTHS, codec=codec, head_dim=head_dim), randn(1, 4, 3, head_dim, seed=4), 3e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 40), (128, 64), (16, 8), (64, 200)])
def test_all_widths_with_every_option(head_dim, value_dim, codec):
    options = {"head_dim": head_dim, "value_dim": value_dim, "batch": 2, "fillers": True, "dropped": 3}
    case = build(ALL_WIDTHS, codec=codec, **options)
    query, sinks = 2 * randn(2, 6, 3, head_dim, seed=5), randn(6, seed=6)
    mask = causal(3, case.length, 2, pads=(0, 6))
    check(case, query, mask=mask, softcap=3.0, sinks=sinks)
    check(case, query, mask=additive(mask) + 0.3 * randn(2, 6, 3, case.length).masked_fill(~mask, 0.0), sinks=sinks)
    check(case, query, window=11, softcap=3.0, sinks=sinks)


@pytest.mark.parametrize("tiers", [((3, 300),), ((4, 290), (16, 40)), ((16, 300), (2, 9), (8, 280), (3, 5))], ids=str)
@pytest.mark.parametrize("weak", [False, True], ids=["even", "sinks"])
def test_large_mean_of_values(tiers, weak):
    """It comes with the probability that coded tokens have, and no other: exact tokens and sinks have the rest."""
    case = build(tiers, codec="spectrum2", head_dim=32, value_dim=40, batch=2)
    frame, wide = case.frame.clone(), slice(64, 104)
    frame[..., wide] = 100 * randn(*frame[..., wide].shape, seed=30)
    case = case._replace(frame=frame)
    query = randn(2, 4, 2, 32, seed=31)
    out = check(case, query, 3e-6, sinks=torch.full((4,), 6.0) if weak else None)
    assert out.abs().max() > 10


@pytest.mark.parametrize("part", [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 49)], ids=str)
def test_every_part_of_a_frame_counts(part):
    case = build(ALL_WIDTHS, codec="spectrum2", batch=2)
    frame, query = case.frame.clone(), randn(2, 4, 1, 16, seed=32)
    frame[..., part] *= 1.5
    out = check(case._replace(frame=frame), query)
    assert error(out, case.attend(query, scale=16**-0.5 * 1.3)) > 0.01


@pytest.mark.parametrize("byte", [0, 1, 127, 128, 200, 254, 255])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_one_byte_scales(bits, byte):
    """From the smallest to the largest one."""
    case = build(((bits, 40),), codec="spectrum2", head_dim=24)
    (segment,) = case.segments
    values = segment.values._replace(affine=torch.full_like(segment.values.affine, byte))
    case = case._replace(segments=[segment._replace(values=values)])
    case.frame[..., 48:72] = 0  # what is small counts, too
    check(case, randn(1, 4, 1, 24, seed=33))


def test_only_one_segment_is_not_empty():
    check(build([(16, 0), (8, 0), (4, 9), (16, 0)]), randn(1, 4, 3, 16))
    check(build([(8, 0), (4, 0), (16, 9)]), randn(1, 4, 3, 16))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_shapes(head_dim, group, queries, batch):
    case = build(batch=batch, head_dim=head_dim, seed=head_dim + group)
    check(case, randn(batch, 2 * group, queries, head_dim, seed=queries))


@pytest.mark.parametrize("codec", CODEC)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_codecs_and_pairings(head_dim, codec):
    check(build(codec=codec, head_dim=head_dim, batch=2, interleaved=True), randn(2, 6, 2, head_dim))


@pytest.mark.parametrize("codec", CODECS)
def test_values_of_another_size(codec):
    out = check(build(codec=codec, head_dim=24, value_dim=40), randn(1, 6, 2, 24))
    assert out.shape == (1, 6, 2, 40)


@pytest.mark.parametrize("codec", CODECS)
def test_many_tokens(codec):
    check(build([(16, 65), (8, 129), (4, 1001), (2, 63), (16, 17)], codec=codec, head_dim=64), randn(1, 4, 2, 64))


def test_mean_that_dominates_the_keys():
    case = build(batch=2, head_dim=64)
    mean = 20 * case.frame
    coded = [s for s in case.segments if s.bits < 16]
    check(case._replace(frame=mean, segments=coded), 0.05 * randn(2, 4, 1, 64))


@pytest.mark.parametrize("dropped", [0, 9])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_left_padding(kind, codec, dropped):
    case = build(codec=codec, batch=3, dropped=dropped)
    mask = causal(5, case.length, 3, pads=(0, 7, 17))
    check(case, randn(3, 4, 5, 16), mask=mask if kind is torch.bool else additive(mask, kind))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [None, 12], ids=["whole", "narrow"])
def test_mask_of_each_head(columns, rows, kind):
    case = build(batch=3)
    mask = torch.rand(rows, 6, 4, columns or case.length, generator=torch.Generator().manual_seed(7)) < 0.6
    mask = mask & causal(4, mask.shape[-1])
    check(case, randn(3, 6, 4, 16), mask=mask if kind == "bool" else additive(mask))


@pytest.mark.parametrize("columns", [None, 12], ids=["whole", "narrow"])
def test_finite_bias_of_each_head(columns):
    case = build(batch=2)
    columns = columns or case.length
    bias = torch.arange(columns) * torch.arange(1, 7).view(6, 1, 1) * 0.1 + torch.zeros(1, 6, 3, columns)
    check(case, randn(2, 6, 3, 16), mask=bias + additive(causal(3, columns)))


@pytest.mark.parametrize("fillers", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("columns", [5, 6, 29])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask_narrower_than_the_sequence(kind, columns, fillers):
    """As sliding layers get it: for the last `columns` positions, nothing before them is seen."""
    case = build(batch=2, fillers=fillers)
    if fillers:  # a row keeps what its last query needs
        case = case._replace(segments=[*case.segments, last_token(case)], length=case.length + 1)
    mask = causal(5, columns) & ~torch.ones(5, columns, dtype=torch.bool).tril(-4)
    check(case, randn(2, 4, 5, 16), mask=mask if kind == "bool" else additive(mask), sinks=randn(4, seed=2))


def last_token(case):
    shape = (*case.segments[0].positions.shape[:2], 1)
    positions = torch.full(shape, case.length, dtype=torch.int32)
    return Segment(16, randn(*shape, 16, seed=8), randn(*shape, 16, seed=9), positions)


@pytest.mark.parametrize("fillers", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("window", [1, 4, 13, 30, 1000])
@pytest.mark.parametrize("queries", [1, 5])
def test_window_without_mask(queries, window, fillers):
    case = build(batch=2, fillers=fillers)
    check(case, randn(2, 4, queries, 16), window=window, sinks=randn(4, seed=2))


@pytest.mark.parametrize("fillers", [False, True])
def test_window_far_ahead(fillers):
    """All tokens at positions beyond the tables of cos and sin that are kept."""
    case, ahead = build(fillers=fillers), LARGEST_TABLE + 1000
    moved = [
        Segment(bits, keys, values, torch.where(positions >= 0, positions + ahead, positions))
        for bits, keys, values, positions in case.segments
    ]
    case = case._replace(segments=moved, length=case.length + ahead)
    check(case, randn(2, 4, 3, 16)[:1], window=25)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_softcap(masked, codec):
    case = build(codec=codec, batch=2)
    mask = additive(causal(3, case.length, 2, pads=(0, 6))) if masked else None
    query = 4 * randn(2, 4, 3, 16)
    out = check(case, query, mask=mask, softcap=2.5)
    assert error(out, case.attend(query, scale=16**-0.5 * 1.3, mask=mask)) > 0.1


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks(dtype, masked, codec):
    case = build(codec=codec, batch=2)
    mask = causal(3, case.length, 2, pads=(0, 6)) if masked else None
    check(case, randn(2, 6, 3, 16), mask=mask, sinks=(3 * randn(6, seed=2)).to(dtype))


def test_everything_at_once():
    case = build(batch=3, head_dim=80, dropped=6, fillers=True)
    mask = additive(causal(5, case.length, 3, pads=(0, 3, 9))) + 0.3 * randn(3, 6, 5, case.length)
    check(case, randn(3, 6, 5, 80), mask=mask.clamp(min=torch.finfo().min), softcap=5.0, sinks=randn(6, seed=2))


@pytest.mark.parametrize("codec", CODEC)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", [None, "bool", "additive"])
def test_ragged(kind, queries, codec):
    case = build(codec=codec, batch=3, fillers=True)
    assert any(bool((s.positions < 0).any()) for s in case.segments)
    mask = causal(queries, case.length, 3, pads=(0, 2, 9))
    check(case, randn(3, 4, queries, 16), mask={None: None, "bool": mask, "additive": additive(mask)}[kind])


@pytest.mark.parametrize("kind", [None, "bool", "additive"])
def test_ragged_places_with_nan_keys(kind):
    """A hidden score is replaced, not added to."""
    case, segments = build(batch=2, fillers=True), []
    for bits, keys, values, positions in case.segments:
        nan = torch.where(positions < 0, torch.nan, 0.0)
        if isinstance(keys, Quantized):
            keys = keys._replace(affine=keys.affine + nan.half().unsqueeze(-1))
        else:
            keys = keys + nan.unsqueeze(-1)
        segments.append(Segment(bits, keys, values, positions))
    mask = causal(2, case.length, 2, pads=(0, 4))
    query, mask = randn(2, 4, 2, 16), {None: None, "bool": mask, "additive": additive(mask)}[kind]
    out = case._replace(segments=segments).attend(query, scale=0.3, mask=mask)
    assert error(out, case.expected(query, scale=0.3, mask=mask)) < 1e-5


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -3.0, 2.0, 40.0])], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "kind", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=["bool", "float32", "float16", "bfloat16"]
)
def test_query_that_sees_nothing_gives_zero(kind, codec, sinks):
    case = build(codec=codec, batch=2)
    mask = causal(5, case.length, 2)
    mask[1, :, :3] = False
    if kind is not torch.bool:
        mask = additive(mask, kind)
    query = randn(2, 4, 5, 16)
    out, expected = (f(query, scale=0.3, mask=mask, sinks=sinks) for f in (case.attend, case.expected))
    assert bool((out[1, :, :3] == 0).all())
    assert error(out[0], expected[0]) < 1e-5
    assert error(out[1, :, 3:], expected[1, :, 3:]) < 1e-5


@pytest.mark.parametrize("kind", ["infinite", "bool"])
@pytest.mark.parametrize("fillers", [False, True], ids=["even", "ragged"])
def test_row_that_sees_nothing_gives_zero(fillers, kind):
    case = build(batch=2, fillers=fillers)
    mask = causal(2, case.length, 2, pads=(0, case.length))
    if kind == "infinite":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = case.attend(randn(2, 4, 2, 16), scale=0.3, mask=mask)
    assert bool(out[0].isfinite().all() and (out[0] != 0).any())
    assert bool((out[1] == 0).all())


def test_window_that_holds_no_token_gives_zero():
    case = build(((4, 6), (16, 5)))._replace(length=40)
    assert bool((case.attend(randn(1, 4, 3, 16), scale=0.3, window=20) == 0).all())


def test_row_of_nothing_but_empty_places_gives_zero():
    case = build(((4, 6), (16, 5)), batch=2, fillers=True)
    segments = [s._replace(positions=s.positions.clone()) for s in case.segments]
    for segment in segments:
        segment.positions[1] = -1
    query = randn(2, 4, 1, 16)
    out = case._replace(segments=segments).attend(query, scale=0.3)
    assert bool((out[1] == 0).all())
    assert error(out[0], case.expected(query, scale=0.3)[0]) < 1e-5


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 3e-4), (torch.bfloat16, 2.5e-3)], ids=["fp16", "bf16"]
)
def test_dtypes(dtype, tolerance, codec):
    """Computed in float32: only the result is rounded."""
    case = build(codec=codec, batch=2, head_dim=64, dtype=dtype)
    query = randn(2, 4, 3, 64).to(dtype)
    check(case, query, tolerance)
    check(
        case, query, tolerance, mask=additive(causal(3, case.length, 2, pads=(0, 9)), dtype), sinks=randn(4).to(dtype)
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("codec", CODECS)
def test_values_near_the_end_of_float16(codec, bits):
    case = build(((bits, 9), (16, 3)), codec=codec)
    coded, exact = case.segments
    values = torch.cat((exact.values, 6e4 * torch.tanh(randn(1, 2, 6, 16))), dim=2)
    coded = coded._replace(values=encode(values, values, coded.positions, bits, case.codec, case.frame, case.rotary)[1])
    check(case._replace(segments=[coded, exact]), randn(1, 4, 2, 16))


def test_views_as_models_and_caches_hand_them_over():
    case = build(ALL_TIERS, batch=2)
    *rest, tail = case.segments
    positions = torch.arange(case.length, case.length + 4, dtype=torch.int32).expand(2, 2, -1)
    buffers = [torch.cat((t, torch.full_like(t, torch.nan)), dim=2) for t in (tail.keys, tail.values)]
    tail = Segment(16, *(t[:, :, :4] for t in buffers), positions)
    case = case._replace(segments=[*rest, tail], length=case.length + 4)
    query = randn(2, 3, 6, 16).transpose(1, 2)
    mask = causal(3, case.length).expand(2, 1, -1, -1)
    check(case, query)
    check(case, query, mask=mask)


def test_order_of_segments_does_not_matter():
    case, query = build(batch=2), randn(2, 4, 2, 16)
    turned = case._replace(segments=case.segments[::-1])
    assert error(turned.attend(query, scale=0.3), case.attend(query, scale=0.3)) < 1e-6


def test_arguments_are_left_as_they_were():
    case, query, sinks = build(batch=2, fillers=True), randn(2, 4, 2, 16), randn(4)
    mask = additive(causal(2, case.length, 2, pads=(0, 3)))
    given = [query, sinks, mask, case.frame, *(t for s in case.segments for part in s[1:] for t in tensors(part))]
    before = [t.clone() for t in given]
    case.attend(query, scale=0.3, mask=mask, sinks=sinks, softcap=3.0)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def tensors(stored):
    return [t for t in stored if t is not None] if isinstance(stored, Quantized) else [stored]


@pytest.mark.parametrize("side", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("masked", [False, True], ids=["decode", "mask"])
def test_a_token_that_is_not_a_number_is_not_hidden(side, masked):
    """Its head gets NaN, as from any attention, and no other head is touched."""
    case = build(((8, 40), (4, 70), (16, 9)), head_dim=32)
    query = randn(1, 4, 2 if masked else 1, 32)
    mask = torch.ones(1, 1, 2, case.length, dtype=torch.bool) if masked else None

    def attend():
        how = {"scale": 0.2, "codec": case.codec, "frame": case.frame, "rotary": case.rotary, "mask": mask}
        return tiered_attention(query, case.segments, length=case.length, **how)

    sound = attend()
    case.segments[-1][side][0, 0, 3] = torch.nan
    out = attend()
    assert out[:, :2].isnan().all()
    assert torch.equal(out[:, 2:], sound[:, 2:])
