"""Time one decode step's attention of one layer on a GPU: tiers read where they lie, against what else is there.

Every time is the median over replays of a CUDA graph that goes through several copies of the inputs, more than the L2
cache holds. `GB/s` counts the bytes that the method has to read; `of copy` is their share of the bandwidth of a
device-to-device copy in the same run.

    python examples/bench_kernels.py --output results/kernels.json --plot results/kernels.png
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spectrumkv_hf.evaluation.report.environment import versions
from spectrumkv_hf.evaluation.report.figures import label_ends, legend_below, lines, new_figure, save
from spectrumkv_hf.support.extras import required
from spectrumkv_hf.support.whole_file import write_whole
from spectrumkv_kernels import (
    CODECS,
    Codec,
    Quantized,
    Rotary,
    Segment,
    dense,
    encode_tiers,
    fit_frame,
    split_frame,
    tiered_attention,
)
from spectrumkv_kernels.segment import can_pack, pack_positions

SHAPES = {  # heads, KV heads, head_dim
    "Qwen2.5-7B": (28, 4, 128),
    "Llama-3-8B": (32, 8, 128),
    "Gemma-2-9B": (16, 8, 256),
}
SIZES = {4096: (1, 4096), 32768: (1, 32768), 131072: (4, 32768), 262144: (8, 32768)}  # B*T: batch, tokens


class Case(NamedTuple):
    """Codec, and shares of tokens by bits."""

    codec: Codec
    tiers: dict[int, float]


CASES = {
    "b=.5": Case(CODECS["spectrum"], {8: 1.0}),
    "b=.3": Case(CODECS["spectrum"], {8: 0.2, 4: 0.8}),
    "8 bits": Case(CODECS["spectrum2"], {8: 1.0}),
    "4 bits": Case(CODECS["spectrum2"], {4: 1.0}),
    "2 bits": Case(CODECS["spectrum2"], {2: 1.0}),
    "[.25]": Case(CODECS["spectrum2"], {8: 0.2, 4: 0.24, 3: 0.15, 2: 0.41}),
    "[.20]": Case(CODECS["spectrum2"], {8: 0.07, 4: 0.26, 3: 0.09, 2: 0.58}),
    "[.15]": Case(CODECS["spectrum2"], {8: 0.02, 4: 0.14, 3: 0.13, 2: 0.37, 1: 0.34}),
}
"""The last three are the mean shares of plans for SmolLM2-135M, whose single layers have two to five tiers."""
SINKS, TAIL = 4, 96
L2_BYTES = 128 << 20
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DTYPE = torch.bfloat16


class Timing(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float


def timed(calls: list[Callable[[], Any]], replays: int = 25) -> Timing:
    """Time of one call: each replay of the graph makes all of them once."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(stop) / len(calls) for start, stop in events])
    return Timing(*(round(float(times.quantile(q)), 5) for q in (0.5, 0.2, 0.8)))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the device."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))  # the driver's, a kernel's
    return 2 * source.nbytes / min(timed([way]).median for way in ways) * 1e3


def copies(size: int) -> int:
    return max(1, -(-L2_BYTES // size))


def exact(batch: int, heads: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, heads, tokens, dim)
    return torch.randn(shape, device="cuda", dtype=DTYPE), torch.randn(shape, device="cuda", dtype=DTYPE)


def tiered(batch: int, heads: int, tokens: int, dim: int, case: Case) -> list[Segment]:
    """Random codes in the layout of a cache after prefill: sinks, coded tokens scattered over the tiers, a tail."""
    middle, balanced = tokens - SINKS - TAIL, case.codec.balanced
    counts = [round(middle * share) for share in case.tiers.values()]
    counts[-1] += middle - sum(counts)
    order = torch.rand(batch, heads, middle, device="cuda").argsort(-1).to(torch.int32) + SINKS
    segments = [Segment(16, *exact(batch, heads, SINKS, dim), torch.arange(SINKS, device="cuda").int())]
    for bits, positions in zip(case.tiers, order.split(counts, dim=-1), strict=True):

        def side(n: int = positions.shape[-1], bits: int = bits) -> Quantized:
            codes = torch.randint(256, (batch, heads, n, dim * bits // 8), device="cuda", dtype=torch.uint8)
            if balanced:
                affine = torch.randint(96, 160, (batch, heads, n, 1), device="cuda", dtype=torch.uint8)
                return Quantized(codes, affine)
            scale = torch.rand(batch, heads, n, device="cuda") / 2**bits
            return Quantized(codes, torch.stack((scale, -scale * 2 ** (bits - 1)), dim=-1).half())

        places = positions.sort(-1).values
        if balanced and can_pack(places):
            places = pack_positions(places)
        segments.append(Segment(bits, side(), side(), places))
    last = torch.arange(tokens - TAIL, tokens, device="cuda").int()
    segments.append(Segment(16, *exact(batch, heads, TAIL, dim), last))
    shared = [s._replace(positions=s.positions.expand(batch, heads, -1)) for s in (segments[0], segments[-1])]
    return [shared[0], *segments[1:-1], shared[1]]


def a_frame(batch: int, heads: int, dim: int, codec: Codec) -> torch.Tensor:
    """Random means, and scales near 1."""
    frame = torch.randn(batch, heads, codec.frame_size(dim, dim), device="cuda")
    if codec.balanced:
        for scale in (split_frame(frame, dim).key_scale, split_frame(frame, dim).value_scale):
            scale.abs_().add_(0.5)
    return frame


def stored_bytes(segments: list[Segment]) -> int:
    tensors = [t for s in segments for t in ((*s.keys, *s.values, s.positions) if s.bits < 16 else (s.keys, s.values))]
    return sum(t.numel() * t.element_size() for t in tensors)


def attend(
    query: torch.Tensor, segments: list[Segment], tokens: int, codec: Codec, frame: torch.Tensor, rotary: Rotary
) -> Any:
    read = tiered_attention
    return read(
        query, segments, length=tokens, scale=query.shape[-1] ** -0.5, codec=codec, frame=frame, rotary=rotary
    )  # fmt: skip


def dequantised(
    query: torch.Tensor, segments: list[Segment], tokens: int, codec: Codec, frame: torch.Tensor, rotary: Rotary
) -> Any:
    return packed(query, *dense(segments, 0, tokens, DTYPE, codec, frame, rotary, True))


def quantized_cache(batch: int, heads: int, tokens: int, dim: int, bits: int = 4) -> tuple[Any, tuple[Any, Any]]:
    """A layer of Transformers' `QuantizedCache` (quanto) that holds `tokens - 1` tokens, and the token to come."""
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=bits, q_group_size=64, residual_length=128)
    keys, values = exact(batch, heads, tokens, dim)
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    return layer, (keys[:, :, -1:], values[:, :, -1:])


def _parts(quantized: Any) -> list[torch.Tensor]:
    """The tensors of a quanto tensor."""
    names, _ = quantized.__tensor_flatten__()
    found = [getattr(quantized, name) for name in names]
    return [part for t in found for part in (_parts(t) if hasattr(t, "__tensor_flatten__") else [t])]


def timed_read(query: torch.Tensor, layer: Any, token: tuple[Any, Any], repeats: int = 10) -> Timing:
    """Milliseconds of `update` with one token, which dequantises all others, and SDPA; started one by one.

    By FlashAttention: every token makes another length, for which cuDNN plans anew in tens of milliseconds.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(2 + repeats):
        torch.cuda.synchronize()
        start.record()
        with sdpa_kernel(BACKENDS["flash"]):
            packed(query, *layer.update(*token))
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return Timing(*(round(float(torch.tensor(times[2:]).quantile(q)), 5) for q in (0.5, 0.2, 0.8)))


def compress(
    keys: torch.Tensor, values: torch.Tensor, order: torch.Tensor, counts: dict[int, int], codec: Codec, rotary: Rotary
) -> None:
    """The frame, then all tiers: `order` as in `encode_tiers`, `counts` by bits."""
    frame = fit_frame(keys, values, 0, rotary, codec.balanced)
    flags = torch.zeros(1 + len(counts), dtype=torch.bool, device=keys.device)
    packs = [codec.balanced] * len(counts)
    encode_tiers(
        keys, values, order, list(counts.values()), list(counts), codec, frame, rotary, 0, flags, [None] * len(counts),
        packs,
    )  # fmt: skip


def packed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The heads of a group as the queries of one head: what Transformers does in decoding."""
    return scaled_dot_product_attention(query.unflatten(1, (keys.shape[1], -1)).squeeze(3), keys, values)


def grouped(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def best_sdpa(query: torch.Tensor, cases: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[str, Timing]:
    found = {}
    for name, backend in BACKENDS.items():
        for form in (packed, grouped):
            try:
                with sdpa_kernel(backend):
                    calls = [partial(form, query, k, v) for k, v in cases]
                    found[f"{name}, {form.__name__}"] = timed(calls)
            except RuntimeError as error:
                print(f"  SDPA {name} {form.__name__}: {str(error).splitlines()[0][:90]}")
                torch.cuda.synchronize()
    return min(found.items(), key=lambda item: item[1].median)


def rows(shapes: list[str], sizes: list[int], peak: float, slow: bool) -> Iterator[dict[str, Any]]:
    for model in shapes:
        heads, kv_heads, dim = SHAPES[model]
        rotary = Rotary(tuple(5e5 ** (-i * 2 / dim) for i in range(dim // 2)))
        for size in sizes:
            batch, tokens = SIZES[size]
            query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=DTYPE)
            whole = 2 * batch * kv_heads * tokens * dim * 2
            cases = [exact(batch, kv_heads, tokens, dim) for _ in range(copies(whole))]
            backend, base = best_sdpa(query, cases)
            del cases
            torch.cuda.empty_cache()
            common = {"model": model, "batch": batch, "tokens": tokens}

            def row(method: str, time: Timing, size: int, base: Timing = base, common: Any = common) -> dict[str, Any]:
                rate = size / time.median * 1e3
                return {
                    **common, "method": method, **time._asdict(), "GB/s": round(rate / 1e9),
                    "of copy": round(rate / peak, 3), "speedup": round(base.median / time.median, 3),
                }  # fmt: skip

            yield row(f"SDPA bf16 ({backend})", base, whole)
            for name, case in CASES.items():
                codec, frame = case.codec, a_frame(batch, kv_heads, dim, case.codec)
                segments = [tiered(batch, kv_heads, tokens, dim, case)]
                stored = stored_bytes(segments[0])
                segments += [tiered(batch, kv_heads, tokens, dim, case) for _ in range(copies(stored) - 1)]
                time = timed([partial(attend, query, s, tokens, codec, frame, rotary) for s in segments])
                yield row(f"SpectrumKV {name}", time, stored)
                if slow:
                    time = timed([partial(dequantised, query, s, tokens, codec, frame, rotary) for s in segments[:2]])
                    yield row(f"dequantise {name}, SDPA", time, stored)
                del segments
                torch.cuda.empty_cache()
                if slow:
                    order = torch.rand(batch, kv_heads, tokens, device="cuda").argsort(-1)
                    counts = {bits: int(tokens * share) for bits, share in case.tiers.items()}
                    parts = order[..., : sum(counts.values())].split(list(counts.values()), dim=-1)
                    order = torch.cat([part.sort(-1).values for part in parts], dim=-1).int()
                    pairs = [exact(batch, kv_heads, tokens, dim) for _ in range(copies(whole))]
                    time = timed([partial(compress, *kv, order, counts, codec, rotary) for kv in pairs])
                    yield row(f"compress {name}", time, whole + stored)
                    del pairs
                    torch.cuda.empty_cache()
            if slow and find_spec("optimum"):
                layer, token = quantized_cache(batch, kv_heads, tokens, dim)
                time = timed_read(query, layer, token)
                held = sum(part.nbytes for t in (layer._quantized_keys, layer._quantized_values) for part in _parts(t))
                yield row("QuantizedCache quanto 4 bit", time, held)
                del layer, token
                torch.cuda.empty_cache()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), choices=SIZES, help="batch times tokens")
    parser.add_argument("--quick", action="store_true", help="SDPA and SpectrumKV only")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG, or another format by its suffix")
    parser.add_argument("--input", type=Path, metavar="JSON", help="plot what an --output holds, and time nothing")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.plot:
        required("matplotlib.figure", "--plot")
    if args.input:
        plot(json.loads(args.input.read_text(encoding="utf-8"))["rows"], args.plot or args.input.with_suffix(".png"))
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py times GPU kernels and finds no CUDA device")
    torch.manual_seed(0)
    peak = copy_bandwidth()
    print(f"copy: {peak / 1e9:.0f} GB/s read and written")
    results = []
    for row in rows(args.shapes, args.sizes, peak, not args.quick):
        results.append(row)
        print(
            f"{row['model']:<12}{row['batch']:>3} x {row['tokens']:<7}{row['method']:<28}{row['median']:>9.4f} ms"
            f" ({row['p20']:.4f}-{row['p80']:.4f}){row['GB/s']:>6} GB/s{row['of copy']:>7.1%} of copy"
            f"{row['speedup']:>7.2f}x SDPA",
            flush=True,
        )
    if args.output:
        about = {**versions(torch.device("cuda")), "triton": metadata.version("triton")}
        report = {"versions": about, "copy GB/s": round(peak / 1e9), "rows": results}
        write_whole(args.output, json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Speedup over SDPA of what attends, by size, one panel for each shape."""
    shapes = list(dict.fromkeys(row["model"] for row in results))
    figure, axes = new_figure("One layer's attention in a decode step", len(shapes), width=3.6, height=3.4)
    for axis, shape in zip(axes, shapes, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in results:
            if row["model"] == shape and not row["method"].startswith(("SDPA", "compress")):
                curves.setdefault(row["method"], []).append((row["batch"] * row["tokens"], row["speedup"]))
        lines(axis, curves)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(title=shape, xscale="log", xlabel="batch x tokens")
        axis.set_ylim(0, 1.05 * max(row["speedup"] for row in results))
    axes[0].set_ylabel("speedup over SDPA, bf16")
    legend_below(figure, axes[-1], label_ends(axes[-1], curves))
    save(figure, path)


if __name__ == "__main__":
    main()
