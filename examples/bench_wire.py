"""Speed of serialize and deserialize, without and with a key, against a memcpy of the same bytes, all in one run.

python examples/bench_wire.py --tokens 4096 --json results/wire-4096.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from spectrumkv_hf import SpectrumCache, wire
from spectrumkv_hf.evaluation.report.environment import versions
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders
from spectrumkv_hf.support.whole_file import write_whole
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.wire.frame import digest
from spectrumkv_hf.wire.mac import mac

KEY = bytes(range(32))


def filled_cache(args: argparse.Namespace, budget: float) -> SpectrumCache:
    """A cache of random keys and values, ranked by their norms."""
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=4 * args.heads * args.head_dim,
        num_attention_heads=4 * args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.head_dim,
    )
    cache = SpectrumCache(config, budget=budget)
    generator = torch.Generator(args.device).manual_seed(0)
    shape = (args.batch, args.heads, args.tokens, args.head_dim)
    for layer in cache.layers:
        assert isinstance(layer, SpectrumLayer)
        keys, values = (torch.randn(shape, generator=generator, device=args.device) for _ in range(2))
        layer.update(keys.to(args.dtype), values.to(args.dtype))
        layer.settle()  # as no attention runs here
    return cache


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    del result
    return took


def measure(cache: SpectrumCache, config: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds of each operation by round; they take turns, so that a slow moment hits all."""
    buffer, keyed = cache.serialize(), cache.serialize(key=KEY)
    target = torch.empty_like(keyed)
    works: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: target[: len(buffer)].copy_(buffer),
        "memcpy into fresh memory": buffer.clone,
        "digest": lambda: digest(buffer),
        "MAC": lambda: mac(KEY, b"frame", buffer.cpu().numpy().data),
        "serialize": cache.serialize,
        "serialize into a buffer": lambda: wire.serialize(cache, out=target),
        "deserialize": lambda: SpectrumCache.deserialize(buffer, config=config),
        "serialize into a buffer, key": lambda: wire.serialize(cache, out=target, key=KEY),
        "deserialize, key": lambda: SpectrumCache.deserialize(keyed, config=config, key=KEY),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            took = seconds(work)
            if turn:  # the first warms up
                times[name].append(took)
    return times


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--dtype", default="bfloat16", help="of exact tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_folders(args.json)
    torch.set_num_threads(args.threads)
    dtype, args.dtype = args.dtype, getattr(torch, args.dtype)
    results = []
    for budget in args.budgets:
        cache = filled_cache(args, budget)
        config = LlamaConfig(**cache.identity)
        times, memory = measure(cache, config, args.rounds), cache.memory()
        size = cache.serialize().numel()
        medians = {name: statistics.median(values) for name, values in times.items()}
        held = memory.stored - sum(n for part, n in memory.parts.items() if part.endswith("positions"))
        result = {
            "budget": budget,
            "wire bytes": size,
            "stored bytes": memory.stored,
            "stored bytes without positions": held,
            "fp16 bytes": memory.fp16,
            "actual ratio": memory.actual_ratio,
            "wire ratio": size / memory.fp16,
            "medians, ms": {name: 1e3 * value for name, value in medians.items()},
            "lowest, ms": {name: 1e3 * min(values) for name, values in times.items()},
            "GiB/s": {name: size / value / 2**30 for name, value in medians.items()},
            "speed over memcpy": {name: medians["memcpy"] / value for name, value in medians.items()},
            "speed over memcpy into fresh memory": {
                name: medians["memcpy into fresh memory"] / value for name, value in medians.items()
            },
        }
        results.append(result)
        print(
            f"b={budget}: {size / 2**20:.1f} MiB on the wire, {memory.stored / 2**20:.1f} stored "
            f"({held / 2**20:.1f} without positions), {memory.fp16 / 2**20:.1f} FP16"
        )
        for name in medians:
            print(
                f"  {name:<29}{1e3 * medians[name]:8.1f} ms {result['GiB/s'][name]:7.1f} GiB/s"
                f"{result['speed over memcpy'][name]:7.2f} of memcpy"
                f"{result['speed over memcpy into fresh memory'][name]:7.2f} of memcpy into fresh memory"
            )
    if args.json:
        settings = {**vars(args), "dtype": dtype, "json": str(args.json)}
        report = {"environment": versions(torch.device(args.device)), "settings": settings, "results": results}
        write_whole(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
