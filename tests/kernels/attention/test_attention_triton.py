"""The Triton attention against plain float64 attention over the dequantised tokens, natively where there is a GPU."""

import pytest
import torch
from reference import error
from test_attention import ALL_TIERS, PACKED_CASES, build, packed_case, randn

from spectrumkv_kernels import Quantized, Segment
from spectrumkv_kernels import tiered_attention as twin
from spectrumkv_kernels.segment import Growing

attention_triton = pytest.importorskip("spectrumkv_kernels.attention.triton_attention")
TIERS = ((16, 5), (8, 67), (4, 131), (16, 33))
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Queries and weights are rounded to 11 bits, and the output to its own dtype."""


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(stored, device):
    return Quantized(*(t.to(device) for t in stored)) if isinstance(stored, Quantized) else stored.to(device)


def on(case, device):
    if isinstance(case.segments, Growing):
        return case
    segments = [
        Segment(s.bits, moved(s[1], device), moved(s[2], device), s.positions.to(device)) for s in case.segments
    ]
    return case._replace(segments=segments, frame=None if case.frame is None else case.frame.to(device))


def attend(case, query, device, **options):
    case = on(case, device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = attention_triton.tiered_attention(
        query.to(device), case.segments, length=case.length, codec=case.codec, frame=case.frame, rotary=case.rotary,
        ragged=case.ragged, **options,
    )  # fmt: skip
    assert out.dtype == query.dtype and out.device.type == device.type
    return out.cpu()


def check(case, query, device, tolerance=None, **options):
    scale = query.shape[-1] ** -0.5 * 1.3
    expected = case.expected(query, scale=scale, **options)
    out = attend(case, query, device, scale=scale, **options)
    assert error(out, expected) < (tolerance or TOLERANCE[query.dtype])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype, device):
    case = build(TIERS, head_dim=head_dim, dtype=dtype)
    check(case, randn(1, 6, 1, head_dim, seed=3).to(dtype), device)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 12, 16])
def test_groups(group, device):
    check(build(TIERS, batch=2, head_dim=32), randn(2, 2 * group, 1, 32, seed=4), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dropped", [0, 1_300_000])
def test_most_query_rows(dropped, device):
    """48 query heads on a KV head and 32 queries, also past 2^20 positions: shared memory, and offsets of 64 bits."""
    case = build(((8, 600), (16, 33)), kv_heads=1, head_dim=128, dropped=dropped)
    check(case, randn(1, 48, 32, 128), device)


@pytest.mark.parametrize("group, queries", [(1, 2), (4, 3), (3, 32), (7, 17)])
def test_several_queries_see_what_is_before_them(group, queries, device):
    case = build(((16, 5), (8, 67), (4, 71), (16, 33)), head_dim=32)
    check(case, randn(1, 2 * group, queries, 32, seed=5), device)


@pytest.mark.parametrize("present", range(1, 16))
def test_tiers_empty_or_not(present, device):
    tiers = [(bits, n if present >> i & 1 else 0) for i, (bits, n) in enumerate(((8, 40), (4, 70), (2, 35), (16, 21)))]
    check(build(tiers, head_dim=32), randn(1, 4, 1, 32, seed=6), device)


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2", "absmax", "rotated", "centred"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_codecs(codec, interleaved, device):
    case = build(ALL_TIERS, codec=codec, head_dim=32, value_dim=48, interleaved=interleaved, batch=3)
    check(case, randn(3, 4, 1, 32, seed=7), device)


ALL_WIDTHS = ((16, 5), (8, 67), (4, 41), (3, 70), (2, 35), (1, 75), (16, 9))


@pytest.fixture
def no_twin(monkeypatch):
    monkeypatch.setattr(attention_triton.attention, "tiered_attention", lambda *a, **k: pytest.fail("the twin's"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [(64, 128), (80, 48), (128, 128), (16, 112)], ids=str)
def test_frames_and_one_byte_scales(dims, dtype, device, no_twin):
    case = build(ALL_WIDTHS, codec="spectrum2", head_dim=dims[0], value_dim=dims[1], dtype=dtype)
    check(case, randn(1, 6, 1, dims[0], seed=3).to(dtype), device)


@pytest.mark.parametrize("bits", [(8,), (4,), (3,), (2,), (1,), (3, 2), (2, 1), (3, 16), (1, 16), (16,)], ids=str)
@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_widths(codec, bits, device, no_twin):
    case = build([(b, 70) for b in bits], codec=codec, head_dim=48, value_dim=32, batch=2)
    check(case, randn(2, 4, 2, 48, seed=7), device)


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
@pytest.mark.parametrize("count", [1, 63, 65, 129])
def test_counts_around_tiles_of_few_bits(count, codec, device, monkeypatch, no_twin):
    monkeypatch.setattr(attention_triton, "SHARE_BYTES", 1)
    case = build(((3, count), (2, count + 1), (1, count + 1), (16, 1)), codec=codec, batch=2, head_dim=32, value_dim=16)
    check(case, randn(2, 4, 1, 32, seed=8), device)


@pytest.mark.parametrize("options", [{"window": 60}, {"softcap": 3.0}, {"sinks": randn(4, seed=11) * 3}], ids=list)
@pytest.mark.parametrize("fillers", [False, True])
def test_options_with_frames(options, fillers, device, no_twin):
    case = build(ALL_WIDTHS, codec="spectrum2", head_dim=32, value_dim=48, batch=2, fillers=fillers, dropped=11)
    check(case, randn(2, 4, 3, 32, seed=9), device, **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=str)
def test_masks_with_frames(dtype, device, no_twin):
    """The first row of the batch sees no token in codes but one; its second query sees none at all."""
    case = build(((4, 70), (3, 40), (16, 9)), codec="spectrum2", head_dim=32, batch=2, fillers=True)
    seen = torch.rand(2, 1, 2, case.length, generator=torch.Generator().manual_seed(12)) < 0.7
    seen[0] = False
    seen[0, :, 0, int(case.segments[0].positions[0, 0, 9])] = True
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min).to(dtype)
    out = check(case, randn(2, 4, 2, 32, seed=14), device, mask=mask)
    assert not out[0, :, 1].any()


@pytest.mark.parametrize(("factor", "offset"), [(1e-6, 0.0), (1e3, 0.0), (1.0, 50.0)], ids=str)
def test_frames_of_any_size(factor, offset, device, no_twin):
    """Values that are small, large, or nearly alike."""
    case = build(((8, 40), (4, 40), (3, 40)), codec="spectrum2", head_dim=32)
    frame = case.frame.clone()
    frame[..., 64:] *= factor
    frame[..., 64:96] += offset
    check(case._replace(frame=frame), randn(1, 4, 1, 32, seed=17), device)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65, 129, 300])
def test_counts_around_tiles(count, device, monkeypatch):
    monkeypatch.setattr(attention_triton, "SHARE_BYTES", 1)  # as many programs as can be
    case = build(((8, count), (4, count + 1), (16, count)), batch=2, head_dim=32, value_dim=16)
    check(case, randn(2, 4, 1, 32, seed=8), device)


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (300, 1, 2, 40), (1, 130, 1, 20), (65, 64, 63, 150)], ids=str)
def test_more_programs_than_tiles(counts, codec, device, monkeypatch, processors, no_twin):
    """Some share no tile, some the ends of two or three tiers: those leave places without a part."""
    processors(30)
    monkeypatch.setattr(attention_triton, "SHARE_BYTES", 1)
    work_of, works = attention_triton.work_of, []
    monkeypatch.setattr(attention_triton, "work_of", lambda *args: works.append(work_of(*args)) or works[-1])
    case = build(list(zip((8, 4, 3, 16), counts, strict=True)), codec=codec, head_dim=32, value_dim=16)
    check(case, randn(1, 4, 1, 32, seed=8), device)
    (work,) = works
    assert work.grid[1] > sum(-(-count // 16) for count in counts)


@pytest.mark.parametrize("options", [{"window": 40}, {"softcap": 3.0}, {"window": 9, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("fillers", [False, True])
def test_window_and_softcap(queries, options, fillers, device):
    case = build(TIERS, head_dim=32, batch=2, fillers=fillers)
    check(case, randn(2, 4, queries, 32, seed=9), device, **options)


@pytest.mark.parametrize("fillers", [False, True])
def test_sinks(fillers, device):
    case = build(TIERS, head_dim=32, batch=2, fillers=fillers, dropped=11)
    check(case, randn(2, 6, 2, 32, seed=10), device, sinks=randn(6, seed=11) * 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4), (1, 4)])
@pytest.mark.parametrize("columns", [236, 100])
def test_masks(shape, columns, dtype, device):
    case = build(TIERS, head_dim=32, batch=2, fillers=True)
    seen = torch.rand(*shape, 2, columns, generator=torch.Generator().manual_seed(12)) < 0.7
    mask = seen
    if dtype != torch.bool:
        bias = randn(*shape, 2, columns, seed=13).to(dtype)
        mask = bias.masked_fill(~seen, torch.finfo(dtype).min)
    check(case, randn(2, 4, 2, 32, seed=14), device, mask=mask)
    wide = torch.nn.functional.pad(mask.float(), (2, 3)).to(dtype)[..., 2:-3]
    check(case, randn(2, 4, 2, 32, seed=14), device, mask=wide)


def test_a_query_that_sees_nothing_gets_zero(device):
    mask = torch.zeros(2, 1, 1, 236, dtype=torch.bool)
    mask[1] = True
    out = attend(build(TIERS, head_dim=32, batch=2), randn(2, 4, 1, 32), device, scale=0.2, mask=mask)
    assert not out[0].any() and out[1].all()


def test_spare_capacity_of_the_tail_is_not_read(device):
    case = build(((8, 40), (4, 30), (16, 25)), head_dim=32, batch=2)
    bits, keys, values, positions = case.segments[-1]

    def roomy(t):
        buffer = t.new_full((*t.shape[:2], 64, t.shape[3]), torch.nan)
        buffer[:, :, : t.shape[2]] = t
        return buffer.to(device)[:, :, : t.shape[2]]

    moved_case = on(case, device)
    tail = Segment(bits, roomy(keys), roomy(values), positions.to(device))
    query = randn(2, 4, 1, 32, seed=15)
    expected = attend(case, query, device, scale=0.2)
    with_room = moved_case._replace(segments=[*moved_case.segments[:-1], tail])
    assert torch.equal(attend(with_room, query, device, scale=0.2), expected)


def test_strided_segments(device):
    """Slices and transposed tensors are read right, if not as fast."""
    case = on(build(TIERS, head_dim=32, batch=2), device)
    query = randn(2, 4, 1, 32, seed=16)
    expected = attend(case, query, device, scale=0.2)

    def spread(t):
        return torch.stack((t, torch.full_like(t, 77)), dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    def stored(x):
        return Quantized(*map(spread, x)) if isinstance(x, Quantized) else spread(x)

    strided = [Segment(s.bits, stored(s.keys), stored(s.values), spread(s.positions)) for s in case.segments]
    assert torch.equal(attend(case._replace(segments=strided), query, device, scale=0.2), expected)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e3])
def test_values_of_any_size(size, device):
    """Weights on value codes are float16: their range must not depend on the values'."""
    case = build(((8, 70), (4, 70), (16, 3)), head_dim=32)
    segments = [
        s._replace(
            values=s.values._replace(affine=(s.values.affine.float() * size).half()) if s.bits < 16 else s.values * size
        )
        for s in case.segments
    ]
    check(case._replace(segments=segments), randn(1, 4, 1, 32, seed=17), device, tolerance=2e-3)


def test_one_token_that_takes_nearly_all_weight(device):
    """What the many others weigh together must not be lost beside it."""
    case = build(((8, 200), (4, 200), (16, 1)), head_dim=32)
    query = randn(1, 2, 1, 32, seed=18)
    last = case.segments[-1]
    strong = query.view(1, 2, 1, 32) * 9 / query.view(1, 2, 1, 32).square().sum(-1, keepdim=True) * 32**0.5 / 1.3
    segments = [*case.segments[:-1], last._replace(keys=strong, values=torch.zeros_like(last.values))]
    check(case._replace(segments=segments), query, device, tolerance=2e-3)


def test_large_means(device):
    """Keys with a huge constant, as in Qwen2.5: the scores of the mean are far larger than the others."""
    case = build(TIERS, head_dim=64)
    query = randn(1, 4, 1, 64, seed=19)
    mean = case.frame.clone()
    mean[..., 27], mean[..., 60] = 60.0, -80.0
    segments = list(case.segments)
    check(case._replace(frame=mean, segments=segments[1:3]), query, device, tolerance=4e-3)


def test_constant_vectors(device):
    case = build(((8, 30), (4, 30), (16, 3)), head_dim=32)
    flat = [
        s._replace(
            values=Quantized(torch.zeros_like(s.values.codes), s.values.affine * torch.tensor([0.0, 1.0]).half()),
            keys=Quantized(torch.zeros_like(s.keys.codes), s.keys.affine * torch.tensor([0.0, 1.0]).half()),
        )
        for s in case.segments[:2]
    ]
    check(case._replace(segments=[*flat, case.segments[2]]), randn(1, 4, 1, 32, seed=20), device)
    check(case._replace(segments=flat), randn(1, 4, 1, 32, seed=20), device)


@pytest.mark.parametrize("head_dim", [6, 20, 512])
def test_other_head_dims_go_to_the_twin(head_dim, device):
    check(build(((8, 9), (4, 8), (16, 3)), head_dim=head_dim), randn(1, 2, 1, head_dim), device)


@pytest.mark.parametrize("name", ["mask", "sinks", "segments"])
def test_tensors_on_another_device(name, device):
    case, query = on(build(TIERS, head_dim=64), device), randn(1, 8, 1, 64).to(device)
    elsewhere = {"mask": torch.ones(1, 1, 1, case.length), "sinks": torch.zeros(8)}
    options = {name: elsewhere[name].to("meta")} if name in elsewhere else {}
    segments = case.segments if options else on(case, torch.device("meta")).segments
    with pytest.raises(ValueError, match=f"{name} must lie on {device}.*got meta"):
        attention_triton.tiered_attention(
            query, segments, length=case.length, codec=case.codec, frame=case.frame, rotary=case.rotary, scale=0.1,
            ragged=case.ragged, **options,
        )  # fmt: skip


def test_same_inputs_same_bits(device):
    case = build(TIERS, head_dim=64, batch=3, fillers=True)
    query = randn(3, 8, 1, 64, seed=21).bfloat16()
    first = attend(case, query, device, scale=0.1)
    for _ in range(10 if device.type == "cuda" else 1):
        assert torch.equal(attend(case, query, device, scale=0.1), first)


@pytest.mark.gpu
def test_lengths_compile_nothing_anew(device):
    kernels = (attention_triton.prepare_kernel, attention_triton.attend_kernel, attention_triton.merge_kernel)
    query = randn(1, 8, 1, 64).bfloat16()

    def compiled():
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    counts = None
    for step in range(500):
        case = build(((16, 4), (8, 30 + step // 3), (4, 90 + step), (16, 1 + step % 128)), head_dim=64)
        attend(case, query, device, scale=0.1)
        counts = counts or compiled()
    assert compiled() == counts


@pytest.mark.gpu
def test_a_captured_graph_reads_tokens_that_came_later(device):
    """Buffers of fixed capacity: places that no token has taken have the position -1."""
    case = on(build(((8, 40), (4, 70), (16, 30)), head_dim=64, batch=2), device)
    full = [s.positions.clone() for s in case.segments]
    query = randn(2, 8, 1, 64).bfloat16().to(device)

    def run():
        return attention_triton.tiered_attention(
            query, case.segments, length=case.length, codec=case.codec, frame=case.frame, rotary=case.rotary, scale=0.1,
            ragged=True,
        )  # fmt: skip

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for held in (7, 21, 30):
        for segment, positions in zip(case.segments, full, strict=True):
            segment.positions.copy_(torch.where(torch.arange(positions.shape[-1], device=device) < held, positions, -1))
        graph.replay()
        expected = twin(
            query.float(), case.segments, length=case.length, codec=case.codec, frame=case.frame, rotary=case.rotary,
            scale=0.1, ragged=True,
        )  # fmt: skip
        assert error(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("side", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("masked", [False, True], ids=["decode", "mask"])
def test_a_token_that_is_not_a_number_is_not_hidden(side, masked, device):
    """Its head gets NaN, as from any attention, and no other head is touched."""
    case = build(((8, 40), (4, 70), (16, 9)), head_dim=32)
    query = randn(1, 4, 2 if masked else 1, 32)
    mask = torch.ones(1, 1, 2, case.length, dtype=torch.bool) if masked else None
    sound = attend(case, query, device, scale=0.2, mask=mask)
    case.segments[-1][side][0, 0, 3] = torch.nan
    out = attend(case, query, device, scale=0.2, mask=mask)
    assert out[:, :2].isnan().all()
    assert torch.equal(out[:, 2:], sound[:, 2:])


OTHERS = [(name, dim) for name in PACKED_CASES for dim in (32, 128, 256)]


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("mask", 32), ("several", 256), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_packed_positions(name, head_dim, device):
    """Tiles of 64 tokens and, from 256 channels on, of which a kernel takes a half at a time."""
    plain, tiled, query, options = packed_case(name, head_dim=head_dim)
    out = attend(tiled, query, device, **options)
    assert torch.equal(out, attend(plain, query, device, **options))
    assert error(out, plain.expected(query, **options)) < TOLERANCE[query.dtype]


@pytest.mark.parametrize("laid_out", ["heads", "one head", "tokens first"])
def test_a_segment_that_grows(laid_out, device):
    """Calls of every kind and number of tokens over the same object, in which tokens come without being announced."""
    case = on(build(((8, 67), (4, 70), (16, 33)), kv_heads=1 if laid_out == "one head" else 2, head_dim=32), device)
    bits, *whole = case.segments[-1]
    room = [torch.zeros_like(t) for t in whole]
    if laid_out == "tokens first":  # which the kernels don't read in place
        room = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in room]
    growing = Growing(case.segments[:-1], Segment(bits, *room))
    for tokens in (1, 3, 20, 33):
        for given, full in zip(room, whole, strict=True):
            given[:, :, :tokens] = full[:, :, :tokens]
        growing.tokens = tokens
        here = case._replace(segments=growing)
        seen = on(here._replace(segments=list(growing)), torch.device("cpu"))
        for queries, masked in ((1, False), (1, False), (1, True), (3, False)):
            query = randn(1, 2 * room[0].shape[1], queries, 32, seed=tokens)
            mask = torch.rand(1, 1, queries, seen.length) > 0.3 if masked else None
            expected = seen.expected(query, scale=0.3, mask=mask)
            out = attend(here, query, device, scale=0.3, mask=mask)
            assert error(out, expected) < 2e-3


def test_nothing_is_worked_out_anew_while_a_segment_grows(device):
    """Each layer of a plan has counts of its own, so no two would share what a step works out."""
    case = on(build(((8, 67), (4, 70), (16, 33)), head_dim=32), device)
    bits, *whole = case.segments[-1]
    growing = Growing(case.segments[:-1], Segment(bits, *whole))
    misses = []
    for tokens in (1, 2, 3, 20, 33):
        growing.tokens = tokens
        here = case._replace(segments=growing, length=case.length + tokens)
        seen = on(here._replace(segments=list(growing)), torch.device("cpu"))
        query = randn(1, 4, 1, 32, seed=tokens)
        assert error(attend(here, query, device, scale=0.3), seen.expected(query, scale=0.3)) < 2e-3
        misses.append([kept.cache_info().misses for kept in (attention_triton.work_of, attention_triton._series)])
    assert misses == misses[:1] * 5
