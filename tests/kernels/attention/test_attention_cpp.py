"""What `test_attention`, which runs with the C++ attention too, leaves out: shares, blocks, threads, the twin."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import error
from test_attention import ALL_WIDTHS, build, causal, check, randn, use_cpp

from spectrumkv_kernels import CODECS, Quantized, Segment
from spectrumkv_kernels.attention import cpp as attention_cpp
from spectrumkv_kernels.attention import reference as attention
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.codec.quantize import divisor, pack

TIERS = ((16, 5), (8, 67), (4, 131), (16, 33))


@pytest.fixture
def cpp(monkeypatch):
    use_cpp(monkeypatch)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 3e-4), (torch.bfloat16, 2.5e-3)]
)
@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
@pytest.mark.parametrize("head_dim", [6, 20, 64, 80, 128, 256, 512])
def test_head_dims(cpp, head_dim, codec, dtype, tolerance):
    tiers = [(bits, count) for bits, count in ALL_WIDTHS if bits == 16 or head_dim % divisor(bits) == 0]
    case = build(tiers, codec=codec, head_dim=head_dim, dtype=dtype)
    check(case, randn(1, 6, 1, head_dim, seed=3).to(dtype), tolerance)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300])
def test_counts_around_blocks_and_shares(cpp, count, codec):
    tiers = ((8, count), (4, count + 1), (16, count), (2, count), (3, count + 2), (1, count + 1))
    case = build(tiers, codec=codec, batch=2, head_dim=32, value_dim=16)
    check(case, randn(2, 4, 1, 32, seed=8), 3e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_beyond_the_table_of_fine_angles(cpp, interleaved):
    """Some tokens, far apart and in no order."""
    case = build(((8, 9), (4, 1500)), head_dim=64, interleaved=interleaved)
    turned = [s._replace(**{field: flipped(getattr(s, field)) for field in s._fields[1:]}) for s in case.segments]
    check(case, randn(1, 4, 1, 64), 3e-6)
    check(case._replace(segments=turned), randn(1, 4, 1, 64), 3e-6)


def flipped(stored):
    return Quantized(*(t.flip(2) for t in stored)) if isinstance(stored, Quantized) else stored.flip(2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4), (1, 4)])
@pytest.mark.parametrize("columns", [236, 100])
def test_masks(cpp, shape, columns, dtype):
    case = build(TIERS, head_dim=32, batch=2, fillers=True)
    mask = seen = torch.rand(*shape, 2, columns, generator=torch.Generator().manual_seed(12)) < 0.7
    if dtype != torch.bool:
        mask = randn(*shape, 2, columns, seed=13).to(dtype).masked_fill(~seen, torch.finfo(dtype).min)
    query = randn(2, 4, 2, 32, seed=14)
    out = check(case, query, mask=mask)
    spread = torch.stack((mask, ~mask if dtype == torch.bool else -mask), dim=-1)[..., 0]
    assert torch.equal(check(case, query, mask=spread), out)


@pytest.mark.parametrize("codec", CODECS)
def test_strided_segments(cpp, codec):
    case, query = build((*TIERS, (3, 70)), codec=codec, head_dim=32, batch=2), randn(2, 4, 1, 32, seed=16)

    def spread(t, dim):
        return (
            torch.stack((t, torch.full_like(t, 77)), dim=dim)
            .transpose(0, 1)
            .contiguous()
            .transpose(0, 1)
            .select(dim, 0)
        )

    expected = case.attend(query, scale=0.2)
    for dim in (-1, 3):
        strided = []
        for bits, keys, values, positions in case.segments:
            keys, values = (
                Quantized(*(spread(t, dim) for t in x)) if isinstance(x, Quantized) else spread(x, dim)
                for x in (keys, values)
            )
            strided.append(Segment(bits, keys, values, spread(positions, -1)))
        assert torch.equal(case._replace(segments=strided).attend(query, scale=0.2), expected)
    across = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(case.attend(across, scale=0.2), expected)


def test_values_that_nearly_cancel_in_codes(cpp):
    """Codes count from the least value: a sum over codes that is put right afterwards would lose digits."""
    case = build(((4, 600), (8, 600)), head_dim=64)
    check(case, 0.01 * randn(1, 4, 1, 64), 2e-6)


def test_large_means(cpp):
    """Keys with a huge constant, as in Qwen2.5: the scores of the mean are far larger than the others."""
    case = build(TIERS, head_dim=64)
    mean = case.frame.clone()
    mean[..., 27], mean[..., 60] = 60.0, -80.0
    check(case._replace(frame=mean, segments=case.segments[1:3]), randn(1, 4, 1, 64, seed=19), 5e-5)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_scores_of_any_size(cpp, size):
    """From all weights alike to one token that takes all."""
    case = build(TIERS, head_dim=32)
    check(case, size * randn(1, 4, 1, 32), 1e-5 if size < 1e3 else 2e-3)


def test_subnormal_and_constant_codes(cpp):
    """Scales and zeros are float16 of any kind."""
    case = build(((8, 30), (4, 30)), head_dim=32)
    for scale, zero in ((6e-8, -3e-7), (0.0, 2.5), (3e-5, 0.0), (-0.25, -0.0)):
        affine = torch.tensor([scale, zero]).half()
        segments = [
            s._replace(values=s.values._replace(affine=affine.expand(s.values.affine.shape).contiguous()))
            for s in case.segments
        ]
        check(case._replace(segments=segments), randn(1, 4, 1, 32, seed=20))


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_neither_threads_nor_rows_change_a_bit(cpp, threads, codec):
    case = build(((8, 700), (4, 1300), (3, 300), (16, 90)), codec=codec, head_dim=64, batch=3)
    query = randn(3, 6, 1, 64)
    threads(1)
    one = case.attend(query, scale=0.2)
    for count in (2, 3):
        threads(count)
        assert torch.equal(case.attend(query, scale=0.2), one)
    alone = [
        Segment(
            s.bits, *(Quantized(*(t[1:2] for t in x)) if isinstance(x, Quantized) else x[1:2] for x in s[1:3]),
            s.positions[1:2],
        )
        for s in case.segments
    ]  # fmt: skip
    row = case._replace(segments=alone, frame=case.frame[1:2]).attend(query[1:2], scale=0.2)
    assert torch.equal(row, one[1:2])


def test_no_second_pool_of_threads(cpp):
    """The library finds the OpenMP runtime that torch has loaded, where no other package brought its own."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    script = """
import torch
from test_attention import build, randn
torch.set_num_threads(2)
build(((8, 600), (4, 600))).attend(randn(1, 4, 1, 16), scale=0.2)
mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(*sorted(path for path in mapped if "libgomp" in path or "libomp" in path or "attention-" in path), sep="\\n")
"""
    here = Path(__file__).parent
    folders = [str(path) for path in (here, here.parents[1] / "support", Path(attention_cpp.__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), VARIABLE: "cpp"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    mapped = run.stdout.split()
    assert len([path for path in mapped if "attention-" in path]) == 1
    assert len([path for path in mapped if "omp" in Path(path).name]) == 1


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_nan_is_not_lost(cpp, codec):
    case, query = build(ALL_WIDTHS, codec=codec), randn(1, 4, 1, 16)
    query[0, 1, 0, 3] = torch.nan
    out = case.attend(query, scale=0.2)
    assert out[0, 1].isnan().all() and out[0, [0, 2, 3]].isfinite().all()
    case.segments[0].values[0, 0, 2, 5] = torch.nan
    out = case.attend(randn(1, 4, 1, 16), scale=0.2)
    assert out[0, :2, 0, 5].isnan().all() and out.isnan().sum() == 2


@pytest.mark.parametrize("what", ["double", "gradients"])
def test_what_goes_to_the_twin(monkeypatch, what):
    """Without a library, so that nothing else could have answered."""
    monkeypatch.setenv(VARIABLE, "torch")
    monkeypatch.setattr(attention_cpp, "library", lambda: pytest.fail("the library was asked for"))
    case, query, options = build(), randn(1, 4, 1, 16), {"scale": 0.2}
    if what == "double":
        query = query.double()
        case = case._replace(segments=[s for s in case.segments if s.bits < 16])
        case.segments.append(Segment(16, randn(1, 2, 4, 16), randn(1, 2, 4, 16), torch.arange(4).int().expand(1, 2, 4)))
    else:
        query.requires_grad_()
    fields = {"length": case.length, "codec": case.codec, "frame": case.frame, "rotary": case.rotary, **options}
    out = attention_cpp.tiered_attention(query, case.segments, **fields)
    assert torch.equal(out, attention.tiered_attention(query, case.segments, **fields))
    assert out.requires_grad == (what == "gradients")


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_workspace_is_as_large_as_is_written(cpp, monkeypatch, codec):
    """Words before and behind it stay what they are."""
    tiers, guard = ((8, 601), (4, 602), (3, 287), (2, 31), (1, 133), (16, 33)), 64
    case = build(tiers, codec=codec, head_dim=24, value_dim=40, batch=2)
    held, library = [], attention_cpp.library()

    class Guarded:
        workspace_floats = staticmethod(lambda problem: library.workspace_floats(problem) + 2 * guard)

        @staticmethod
        def tiered_attention(problem):
            count = library.workspace_floats(problem) + 2 * guard
            words = (ctypes.c_uint32 * count).from_address(problem.workspace)
            before = [words[:guard], words[-guard:]]
            problem.workspace += 4 * guard
            library.tiered_attention(problem)
            held.append([words[:guard], words[-guard:]] == before)

    monkeypatch.setattr(attention_cpp, "library", lambda: Guarded)
    for queries in (1, 3):
        check(case, randn(2, 6, queries, 24), mask=causal(queries, case.length))
    assert held == [True, True]


@pytest.mark.parametrize("dim", [16, 64, 128, 216])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_every_code(cpp, bits, dim):
    """Each code of each channel once, with the same weight for all tokens."""
    case = build(((16, 1),), codec="absmax", head_dim=dim)
    tokens = 2**bits
    codes = (torch.arange(tokens).view(tokens, 1) + torch.arange(dim)) % tokens
    packed = pack(codes.to(torch.uint8), bits).expand(1, 2, -1, -1)
    values = Quantized(packed.contiguous(), torch.full((1, 2, tokens, 1), 0.5, dtype=torch.float16))
    positions = torch.arange(tokens, dtype=torch.int32).expand(1, 2, -1)
    case = case._replace(segments=[Segment(bits, values, values, positions)], length=tokens)
    check(case, randn(1, 2, 1, dim), 2e-6)
    assert error(case.attend(torch.zeros(1, 2, 1, dim), scale=1.0), torch.full((1, 2, 1, dim), -0.25)) < 1e-5
