"""Sizes at which 32 bits end, and CUDA's short grid axes: kernels in the interpreter, on memory that is hardly there.

Of a launch only some programs run, those at the end. The interpreter checks every sum and product of 32-bit integers.
"""

import dataclasses
import itertools
import math
import mmap
import tempfile

import pytest
import torch
from reference import error, frequencies
from test_attention import CODEC, Case, build, randn

from spectrumkv_kernels import Quantized, Rotary, Segment
from spectrumkv_kernels.attention import cpp as attention_cpp
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.codec import frame
from spectrumkv_kernels.codec import reference as codec
from spectrumkv_kernels.scores import reference as scores
from spectrumkv_kernels.wire import checksum

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("for the interpreter", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from spectrumkv_kernels.attention import triton_attention as attention_triton
from spectrumkv_kernels.codec import triton_codec as codec_triton
from spectrumkv_kernels.codec import triton_encode as encode_triton
from spectrumkv_kernels.codec import triton_frame as frame_triton
from spectrumkv_kernels.scores import triton_scores as scores_triton
from spectrumkv_kernels.wire import triton_checksum as checksum_triton

MANY = 65600
"""More than the second and third axis of a grid can have."""
SHORT, LONG = 65535, 2**31 - 1
"""Programs along the second and third axis of a grid, and along the first."""


def sparse(*shape, dtype=torch.float32):
    """Zeros; the system provides memory for what is written."""
    with tempfile.TemporaryFile() as file:
        try:
            file.truncate(max(math.prod(shape), 1) * dtype.itemsize)
            memory = mmap.mmap(file.fileno(), 0)
        except OSError as problem:
            pytest.skip(f"no sparse files, or too few addresses: {problem}")
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(shape)


class Launches:
    """What is launched, and which of its programs run."""

    def __init__(self, monkeypatch):
        self.grids = {}
        self.chosen = {}
        programs, made, builder = [], interpreter.GridExecutor.__init__, interpreter.interpreter_builder

        def init(executor, fn, names, grid, *rest, **more):
            grid = (*grid, 1, 1)[:3]
            self.grids[fn.__name__] = grid
            assert grid[0] <= LONG and max(grid[1:]) <= SHORT, f"{fn.__name__}: CUDA has no grid {grid}"
            chosen = self.chosen.get(fn.__name__, lambda grid: itertools.product(*map(range, grid)))
            programs[:] = [(*program, 0, 0)[:3] for program in chosen(grid)]
            assert programs and all(0 <= p < n for program in programs for p, n in zip(program, grid, strict=True))
            made(executor, fn, names, (len(programs), 1, 1), *rest, **more)
            builder.grid_dim = grid

        monkeypatch.setattr(interpreter.GridExecutor, "__init__", init)
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", self.grid_of(programs)))
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, *_: setattr(builder, "grid_idx", programs[x]))
        # It would copy every tensor to itself.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))

    def grid_of(self, programs):
        return list(self.grids.values())[-1]

    def last(self, name, count=1):
        """Of this kernel's programs the last ones along the first axis run, whatever they are along the others."""
        self.chosen[name] = lambda grid: itertools.product(range(grid[0] - count, grid[0]), *map(range, grid[1:]))


@pytest.fixture
def launches(monkeypatch):
    """Memory that programs which don't run leave unwritten is 0."""
    zeros = torch.zeros

    def allocated(*size, dtype=torch.float32, device=None):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        small = math.prod(shape) * dtype.itemsize < 1 << 26
        return zeros(shape, dtype=dtype, device=device) if small else sparse(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch, "zeros", allocated)
    return Launches(monkeypatch)


def attend(case, query, **options):
    return attention_triton.tiered_attention(
        query, case.segments, length=case.length, codec=case.codec, frame=case.frame, rotary=case.rotary, **options
    )


def test_the_interpreter_sees_an_overflow(launches):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, n):
        tl.store(out, (tl.program_id(0) + n) * 2)

    with pytest.raises(Exception, match="int32 overflow"):
        kernel[(1,)](torch.zeros(1, dtype=torch.int64), 2**30)


def test_scores_of_the_mean_for_many_rows_at_a_million_positions(launches, processors):
    """48 query heads on a KV head and 32 queries: `position * 2048`."""
    processors(1 << 20)
    case = build(((8, 6), (16, 5)), kv_heads=1, dropped=3 << 19)
    coded = case.segments[0].positions
    assert coded.max() > 1 << 20
    query = randn(1, 48, 32, 16, seed=3)
    turning, blocks = -(-48 * 32 // attention_triton.TURNED), 2048 // attention_triton.PREPARED
    scored = sorted({position // attention_triton.FINE for position in coded.flatten().tolist()})
    last = 48 * 32 // attention_triton.PREPARED - 2  # what scores the last 64 rows, which are two heads
    programs = [*range(turning), *(turning + part * blocks + last + i for part in scored for i in range(2))]
    launches.chosen["prepare_kernel"] = lambda grid: [(program,) for program in programs]
    launches.last("attend_kernel")
    launches.last("merge_kernel", 64)
    out = attend(case, query, scale=0.3)
    assert launches.grids["prepare_kernel"][0] == turning + -(-case.length // attention_triton.FINE) * blocks
    assert error(out[:, -2:], case.expected(query[:, -2:], scale=0.3)) < 1e-3


@pytest.mark.parametrize("bits, tokens", [(16, 1 << 23), (8, 1 << 24)])
def test_a_row_of_more_elements_than_32_bits_count(bits, tokens, launches, processors):
    """`token * head_dim`, with half as many 16-bit words in codes of 8 bits."""
    processors(128)
    dim, last = 256, 700
    tokens += last
    positions = torch.arange(tokens, dtype=torch.int32).view(1, 1, -1)
    keys, values = randn(1, 1, last, dim, seed=1).half(), randn(1, 1, last, dim, seed=2).half()

    def placed(t):
        whole = sparse(1, 1, tokens, t.shape[-1], dtype=t.dtype)
        whole[:, :, -last:] = t
        return whole

    rotary, plain = Rotary(()), CODEC["rotated"]
    if bits < 16:
        keys, values = codec.encode(keys.float(), values.float(), positions[..., -last:], bits, plain, None, rotary)
        held = [Quantized(*map(placed, side)) for side in (keys, values)]
        keys, values = codec.decode(keys, values, positions[..., -last:], bits, plain, None, rotary)
    else:
        held = [placed(keys), placed(values)]
    query = randn(1, 1, 1, dim, seed=3).half()
    launches.chosen["attend_kernel"] = lambda grid: [(0, grid[1] - 1)]
    case = Case([Segment(bits, *held, positions)], tokens, plain, None, rotary, False)
    out = attend(case, query, scale=0.1, window=last)
    weights = torch.softmax(keys[0, 0].double() @ query[0, 0, 0].double() * 0.1, 0)
    assert error(out[0, 0, 0], weights @ values[0, 0].double()) < 2e-3


def test_more_rows_and_heads_than_a_grid_axis(launches):
    """Attention over one token of each; and the queries are more elements than 32 bits count."""
    dim, group, queries = 128, 8, 32
    assert MANY * group * queries * dim > 1 << 31
    case = build(((8, 3), (16, 33)), batch=1, kv_heads=1, head_dim=dim)
    many = [Segment(s.bits, *map(repeated, s[1:3]), repeated(s.positions)) for s in case.segments]
    mean = case.frame.expand(MANY, -1, -1).contiguous()
    query = sparse(MANY, group, queries, dim, dtype=torch.float16)
    query[-1] = randn(group, queries, dim, seed=3)
    rows = group * queries
    launches.last("attend_kernel", rows // attention_triton.ROWS)
    launches.last("merge_kernel", rows)
    turning, scoring = rows // attention_triton.TURNED, rows // attention_triton.PREPARED
    launches.chosen["prepare_kernel"] = lambda grid: [
        (i,) for i in (*range((MANY - 1) * turning, MANY * turning), *range(grid[0] - scoring, grid[0]))
    ]
    out = attend(case._replace(segments=many, frame=mean), query, scale=0.1)
    assert error(out[-1:], case.expected(query[-1:], scale=0.1)) < 2e-3


def repeated(stored):
    """For `MANY` rows of the batch."""
    if isinstance(stored, Quantized):
        return Quantized(*map(repeated, stored))
    return stored.expand(MANY, *stored.shape[1:]).contiguous()


LAST = {"_dense_kernel": 2} | dict.fromkeys(
    ("_encode_kernel", "sums_kernel", "mean_kernel", "power_kernel", "size_kernel"), 1
)


@pytest.mark.parametrize("name", ["spectrum", "absmax"])
def test_codecs_of_more_rows_and_heads_than_a_grid_axis(name, launches):
    batch, heads, tokens, dim = MANY // 2, 2, 5, 16
    keys, values = (randn(1, heads, tokens, dim, seed=seed).expand(batch, -1, -1, -1) for seed in (1, 2))
    positions = torch.arange(tokens, dtype=torch.int32).expand(batch, heads, -1)
    rotary = Rotary(frequencies(dim // 2))
    for kernel, count in LAST.items():
        launches.last(kernel, count)
    one = [t[-1:] for t in (keys, values, positions)]
    for balanced in (True, False):
        expected = frame.fit_frame(*one[:2], 0, rotary, balanced)
        found = frame_triton.fit_frame(keys, values, 0, rotary, balanced)
        assert error(found[-1, -1], expected[0, -1]) < 1e-5
    mean = expected.expand(batch, -1, -1) if CODEC[name].center else None
    options = CODEC[name], mean, rotary
    alone = CODEC[name], None if mean is None else mean[-1:], rotary
    coded = encode_triton.encode(keys, values, positions, 8, *options)
    wanted = codec.encode(*one, 8, *alone)
    for side, other in zip(coded, wanted, strict=True):
        assert all(torch.equal(x[-1, -1], y[0, -1]) for x, y in zip(side, other, strict=True))
    whole = [Quantized(*(t.expand(batch, -1, -1, -1).contiguous() for t in side)) for side in wanted]
    exact = Segment(16, keys, values, positions + tokens)
    out = codec_triton.dense([Segment(8, *whole, positions), exact], 0, 2 * tokens, torch.float32, *options)
    segments = [Segment(8, *wanted, one[2]), Segment(16, *one[:2], one[2] + tokens)]
    for x, y in zip(out, codec.dense(segments, 0, 2 * tokens, torch.float32, *alone), strict=True):
        assert error(x[-1, -1], y[0, -1]) < 1e-5


def far_apart(t, step=1 << 28):
    """The same tokens, each `step` elements behind the one before."""
    batch, heads, tokens, dim = t.shape
    assert batch == heads == 1 and tokens * step > 1 << 31
    whole = sparse(tokens * step, dtype=t.dtype).as_strided(t.shape, (step, step, step, 1))
    return whole.copy_(t)


@pytest.mark.parametrize("start", [None, 0])
def test_codecs_of_tokens_far_apart(start, launches):
    keys, values = (randn(1, 1, 10, 16, seed=seed) for seed in (1, 2))
    positions = torch.arange(10, dtype=torch.int32).view(1, 1, -1)
    rotary, mean = Rotary(frequencies(8)), randn(1, 1, 16, seed=3)
    far = far_apart(keys), far_apart(values)
    taken = positions if start is None else positions.flip(-1)
    for x, y in zip(
        encode_triton.encode(*far, taken, 8, CODEC["spectrum"], mean, rotary, start),
        encode_triton.encode(keys, values, taken, 8, CODEC["spectrum"], mean, rotary, start),
        strict=True,
    ):
        assert all(map(torch.equal, x, y))
    x, y = (frame_triton.fit_frame(*sides, 0, rotary, True) for sides in (far, (keys, values)))
    assert torch.equal(x, y)
    out = codec_triton.dense(
        [Segment(16, *far, positions)], 0, 10, torch.float32, CODEC["spectrum"], mean, rotary, complete=True
    )
    assert torch.equal(out[0], keys) and torch.equal(out[1], values)
    query, plain = randn(1, 2, 12, 16, seed=4), {"scale": 0.3, "recent": 4, "strided": 3}
    assert torch.equal(*(scores_triton.attention_scores(query[:, :, :10], k, **plain) for k in (far[0], keys)))
    assert error(scores_triton.attention_scores(query[:, :, :10], keys, **plain), scores.attention_scores(
        query[:, :, :10], keys, **plain)) < 1e-5  # fmt: skip


@pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")
def test_compiled_attention_over_tokens_far_apart():
    case = build(((16, 10),), kv_heads=1)
    (held,) = case.segments
    far = case._replace(segments=[held._replace(keys=far_apart(held.keys), values=far_apart(held.values))])
    fields = {"length": 10, "codec": case.codec, "frame": case.frame, "rotary": case.rotary, "scale": 0.3}
    query = randn(1, 2, 1, 16, seed=4)
    assert torch.equal(*(attention_cpp.tiered_attention(query, c.segments, **fields) for c in (far, case)))


@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_more_rows_and_heads_than_a_grid_axis(masked, launches):
    keys, query = (randn(1, 1, 5, 16, seed=seed).expand(MANY, -1, -1, -1) for seed in (1, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(MANY, 1, -1, -1) if masked else None
    launches.last("_normalisers_kernel")
    launches.last("_mass_kernel")
    found = scores_triton.attention_scores(query, keys, scale=0.3, mask=mask)
    assert error(found[-1], scores.attention_scores(query[-1:], keys[-1:], scale=0.3)[0]) < 1e-5


def test_a_digest_of_more_words_than_32_bits_count(launches):
    row, count = checksum_triton.ROW, (1 << 31) + 5000
    words = sparse(count, dtype=torch.int64)
    words[-5000:] = torch.arange(5000)
    launches.last("digest_kernel", 2)
    start = (count // row - 8) * row
    sums, expected = checksum_triton.digest_sums(words), checksum.digest_sums(words[start:])
    assert torch.equal(sums[start // row :], expected)
