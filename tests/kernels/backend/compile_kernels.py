"""Compiles the Triton kernels for an H100, which needs no GPU. Run by test_compiles.py in a process of its own.

With `all` in every way that is known to differ; without, each kernel once or twice.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Driver:
    """Stands in for a GPU's driver: enough of one to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver.set_active(Driver())
run, compiled = JITFunction.run, set()
SHARED, RESERVED = 227 << 10, 1 << 10
"""Bytes that a program has on an H100, and that it takes beside its own of the multiprocessor's, which are both."""


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    shared = kernel.metadata.shared
    assert shared <= SHARED, f"{self.__name__} takes {shared} bytes of shared memory, of {SHARED}: it can't be launched"
    if "maxnreg" in options:  # as many programs are counted on as registers suffice for
        resident = attention_triton.resident(options["num_warps"], options["maxnreg"])
        held = resident * (shared + RESERVED)
        assert held <= SHARED + RESERVED, f"{resident} programs of {self.__name__} with {shared} bytes don't fit"
    compiled.add(self.__name__)


JITFunction.run = compile_only

import torch  # noqa: E402
from reference import frequencies  # noqa: E402
from test_attention import build, packed, randn  # noqa: E402

from spectrumkv_kernels import CODECS, Rotary  # noqa: E402
from spectrumkv_kernels.attention import triton_attention as attention_triton  # noqa: E402
from spectrumkv_kernels.codec import triton_codec as codec_triton  # noqa: E402
from spectrumkv_kernels.codec import triton_encode as encode_triton  # noqa: E402
from spectrumkv_kernels.codec import triton_frame as frame_triton  # noqa: E402
from spectrumkv_kernels.codec import triton_partition as partition_triton  # noqa: E402
from spectrumkv_kernels.scores import triton_scores as scores_triton  # noqa: E402
from spectrumkv_kernels.static import triton_append as append_triton  # noqa: E402
from spectrumkv_kernels.static import triton_attend as attend_triton  # noqa: E402
from spectrumkv_kernels.static.layout import STATE, Layout, Room  # noqa: E402
from spectrumkv_kernels.wire import triton_checksum as checksum_triton  # noqa: E402

attention_triton._overlaps = lambda device: True

TIERS = (16, 5), (8, 67), (4, 71), (16, 33)
SMALL = (16, 5), (3, 67), (2, 71), (16, 33)
EVERY = slice(None) if "all" in sys.argv else slice(2)
for head_dim, codec, tiers, fillers, widths, options in (
    (128, "spectrum2", TIERS, False, (8, 3), {}),
    (80, "absmax", TIERS, True, (), {"mask": torch.ones(1, 1, 1, 176, dtype=torch.bool), "sinks": randn(4)}),
    (128, "spectrum", TIERS, False, (8, 4), {}),
    (256, "spectrum", TIERS, False, (4,), {"softcap": 30.0, "window": 20}),
    (64, "spectrum2", SMALL, False, (), {"mask": randn(1, 4, 1, 176).bfloat16(), "softcap": 30.0, "window": 20}),
)[EVERY]:
    case = build(tiers, head_dim=head_dim, codec=codec, fillers=fillers, dtype=torch.bfloat16)
    if codec == "spectrum2":
        case = packed(case)
    fields = {"codec": case.codec, "frame": case.frame, "rotary": case.rotary}
    query = randn(1, 4, 1, head_dim).bfloat16()
    more = {"length": case.length, "ragged": fillers, "scale": 0.1, **fields, **options}
    attention_triton.tiered_attention(query, case.segments, **more)
    if not widths:
        continue
    codec_triton.dense(case.segments, 0, case.length, torch.bfloat16, *fields.values())
    keys, positions = randn(1, 2, 40, head_dim).bfloat16(), torch.arange(40, dtype=torch.int32)
    balanced = codec == "spectrum2"
    pads, power = torch.tensor([3]), frame_triton.query_power(randn(1, 4, 90, head_dim).bfloat16(), 2)
    frame_triton.fit_frame(keys, keys, 2, case.rotary, False)
    if balanced:
        frame_triton.fit_frame(keys, keys, 2, case.rotary, True, 4, pads, power)
    for tokens in (40, 4100):
        partition_triton.partition(randn(1, 2, tokens), [4, 0, tokens - 4], 0, 4)
    each, flags = positions.expand(1, 2, -1).contiguous(), torch.zeros(4, dtype=torch.bool)
    share, tiers = [4, 18, 18], [16, *widths]
    counts, packs = share[: len(tiers)], [codec == "spectrum2" and bits < 16 for bits in tiers]
    segments = encode_triton.encode_tiers(
        keys, keys, each, counts, tiers, *fields.values(), 0, flags, [None] * len(tiers), packs
    )
    encode_triton.encode(keys, keys, each, widths[0], *fields.values())
    codec_triton.dense(segments, 0, 40, torch.bfloat16, *fields.values())
    many = randn(1, 4, 90, head_dim).bfloat16()
    scores_triton.attention_scores(many, randn(1, 2, 90, head_dim).bfloat16(), scale=0.1, sinks=randn(4))
    scores_triton.attention_scores(many, randn(1, 2, 4200, head_dim).bfloat16(), scale=0.1)
if "all" in sys.argv:  # most query rows of a KV head: 48 heads and 32 queries
    case = build(((16, 5), (4, 71)), head_dim=128, kv_heads=1, dtype=torch.bfloat16)
    fields = {"codec": case.codec, "frame": case.frame, "rotary": case.rotary}
    attention_triton.tiered_attention(
        randn(1, 48, 32, 128).bfloat16(), case.segments, length=case.length, scale=0.1, **fields
    )
# Layers of fixed capacity.
state = torch.zeros(STATE, dtype=torch.int32)
tiers = (Room(16, 20), Room(8, 100), Room(4, 200))
for codec, head_dim, dtype, rooms in (
    ("spectrum2", 64, torch.bfloat16, (Room(16, 20), Room(3, 100))),
    ("spectrum", 128, torch.bfloat16, ()),
    ("spectrum", 128, torch.bfloat16, tiers),
    ("absmax", 80, torch.bfloat16, tiers),
)[EVERY]:
    keys = randn(1, 2, 1, head_dim).to(dtype)
    rotary = build(((16, 5),), head_dim=head_dim).rotary
    layout = Layout(
        1, 2, head_dim, head_dim, dtype, 400, 250, rooms, 128, 4, False, False, "kv_norm", 0.1, CODECS[codec], rotary
    )
    append_triton.append(torch.empty(layout.size, dtype=torch.uint8), state, keys, keys, layout)
checksum_triton.digest_sums(torch.zeros(3000, dtype=torch.int64))
# Layers of fixed capacity, the counts of which are on the device.
for head_dim, rooms, options in (
    (256, (Room(8, 80), Room(4, 320)), {"softcap": 30.0}),
    (128, (Room(16, 8), Room(8, 80), Room(4, 320)), {"sinks": randn(8)}),
)[slice(None) if "all" in sys.argv else slice(1)]:
    layout = Layout(
        1, 2, head_dim, head_dim, torch.bfloat16, 400, 80, rooms, 8, 4, False, False, "kv_norm", 0.0,
        CODECS["spectrum"], Rotary(frequencies(head_dim // 2)),
    )  # fmt: skip
    buffer, state = torch.zeros(layout.size, dtype=torch.uint8), torch.zeros(STATE, dtype=torch.int32)
    query = randn(1, 8, 1, head_dim).bfloat16()
    for mask in (None, torch.ones(1, 1, 1, 400, dtype=torch.bool))[: 3 - head_dim // 128]:
        attend_triton.attend(query, buffer, state, layout, scale=0.1, mask=mask, **options)
print(*sorted(compiled))
