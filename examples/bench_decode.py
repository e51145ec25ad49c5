"""Time of a decode step over a long context: SpectrumCache against DynamicCache and Transformers' QuantizedCache.

python examples/bench_decode.py --context 2048 --caches dynamic 0.5 0.3 quanto:4
python examples/bench_decode.py --context 2048 --compile --caches dynamic static-flex 0.5 0.3
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import CompileConfig, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache, StoppingCriteria
from transformers.cache_utils import Cache

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.evaluation.protocols.quality import prefill
from spectrumkv_hf.evaluation.report.environment import environment, settings_of
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders, print_table
from spectrumkv_hf.evaluation.subjects.methods import cache_memory
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.policy.calibrated import Calibrated, LayerCost, allocate
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.whole_file import write_whole
from spectrumkv_kernels import CODECS, DEFAULT_CODEC

BASELINE = "dynamic"
STATIC = {"static": "sdpa", "static-flex": "flex_attention"}
"""Names of `StaticCache`, and the attention that reads it."""
WARM = 4
"""Steps of `generate` that are not counted: prefill, compilation, and the recording of a CUDA graph."""
FILL_TOKENS = 4096
"""Tokens of a chunk where caches are filled with random keys and values."""


def cache_maker(
    name: str, model: PreTrainedModel, capacity: int | None = None, tokenizer: Any = None
) -> Callable[[], Cache]:
    """What `--caches` names: `dynamic`, `fp16`, a budget of `SpectrumCache`, `CODEC:BUDGET` for one of another codec,
    `plan:BUDGET` for one by the probe's plan, `typical:BUDGET` for one by `typical_plan`, or `BACKEND:BITS` of
    `QuantizedCache`.

    Args:
        name: With `capacity` also `static` and `static-flex`, for `StaticCache` under sdpa and flex_attention.
        model: Whose config they take.
        capacity: Tokens that a cache takes which has to know.
        tokenizer: For the probe.

    Raises:
        ValueError: none of those.
    """
    if name == BASELINE:
        return lambda: DynamicCache(config=model.config)
    if name in STATIC and capacity is not None:
        return lambda: StaticCache(config=model.config, max_cache_len=capacity)
    if name == "fp16":
        return lambda: SpectrumCache(config=model.config, policy="fp16", max_cache_len=capacity)
    backend, colon, bits = name.partition(":")
    if colon and bits.isdigit():
        return lambda: QuantizedCache(backend=backend, config=model.config, nbits=int(bits))
    kind, number = backend if colon else DEFAULT_CODEC, name.rpartition(":")[2]
    try:
        budget = float(number)
    except ValueError:
        kind, budget = "unknown", 0.0
    if kind == "plan":
        return lambda: SpectrumCache.from_model(model, tokenizer, budget, max_cache_len=capacity)
    if kind == "typical":
        policy = typical_plan(model.config.num_hidden_layers, budget)
        return lambda: SpectrumCache(model.config, policy=policy, max_cache_len=capacity)
    if kind not in CODECS:
        known = f"{BASELINE}, fp16, a budget such as 0.3, spectrum:0.3, plan:0.2, typical:0.2, quanto:4"
        raise ValueError(f"cache {name!r}: choose {known}; with --compile also {' or '.join(STATIC)}")
    return lambda: SpectrumCache(config=model.config, budget=budget, codec=kind, max_cache_len=capacity)


def typical_plan(layers: int, budget: float) -> Calibrated:
    """A plan for a model without a tokenizer, or whose weights are random: by numbers as a probe found them once.

    Sensitivities spread evenly, by their logarithms, over three and a half orders of magnitude, in an order that mixes
    them. Of 64 tokens the first gets most of the attention, the others less and less. So its shares, and how many tiers
    a layer has, are about those of the plans for SmolLM2-135M.
    """
    mixed = torch.randperm(layers, generator=torch.Generator().manual_seed(0)).tolist()
    weights = [42.0, *(5.2 * i**-1.3 for i in range(1, 64))]
    weights = [weight * len(weights) / sum(weights) for weight in weights]
    costs = [LayerCost(10 ** (-3.5 * rank / max(layers - 1, 1)), weights, 0.006) for rank in mixed]
    return Calibrated(budget=budget, layers=tuple(enumerate(allocate(costs, budget))))


@torch.no_grad()  # what a static cache makes in inference mode can't be changed outside
def fill(model: PreTrainedModel, cache: Cache, batch: int, tokens: int) -> None:
    """Put `tokens` random keys and values into every layer, in chunks, as a prefill in chunks would."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for start in range(0, tokens, FILL_TOKENS):
        shape = (batch, config.num_key_value_heads, min(FILL_TOKENS, tokens - start), dim)
        keys = torch.randn(shape, dtype=model.dtype, device=model.device)
        for layer in range(config.num_hidden_layers):
            cache.update(keys, keys.flip(2), layer)


@torch.inference_mode()
def decode_times(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, steps: int, random: bool = False
) -> list[float]:
    """Seconds of each of `steps` forwards with one token, after a prefill of `ids` and a step of warm-up.

    With `random` the cache gets random keys and values in the place of a prefill.
    """
    if random:
        fill(model, cache, *ids.shape)
    else:
        prefill(model, ids, cache)
    token, times = ids[:, -1:], []
    for _ in range(1 + steps):
        if ids.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        token = model(input_ids=token, use_cache=True, **cache_argument(cache, model)).logits[:, -1:].argmax(-1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times[1:]


@torch.inference_mode()
def prefill_time(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, chunk: int | None) -> float:
    """Seconds of a prefill, in chunks of as many tokens as are given or at once."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for part in ids.split(chunk or ids.shape[1], dim=1):
        model(input_ids=part, use_cache=True, logits_to_keep=1, **cache_argument(cache, model))
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Clock(StoppingCriteria):
    """When each step of `generate` was done; stops nothing."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode(False)
def generate_times(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, steps: int, random: bool = False, everywhere: bool = False
) -> tuple[list[float], float, int]:
    """Seconds of each of `steps` steps of `generate`, of the first `WARM` together, and bytes that all of them took of
    the device beside the cache, with those of a CUDA graph.

    Args:
        model, ids, cache, steps, random: As in `decode_times`.
        everywhere: Compile on a CPU, too, where `generate` does so for tests only.
    """
    if random:
        fill(model, cache, len(ids), ids.shape[1] - 1)
    settings: dict[str, Any] = {"max_new_tokens": WARM + steps, "do_sample": False, "eos_token_id": None}
    if everywhere:
        settings["compile_config"] = CompileConfig()
        settings["compile_config"]._compile_all_devices = True
    mask, before = torch.ones_like(ids), 0
    if ids.is_cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
    clock = Clock()
    model.generate(
        ids, attention_mask=mask, stopping_criteria=[clock], pad_token_id=0, **settings, **cache_argument(cache, model)
    )
    times = [end - start for start, end in itertools.pairwise(clock.times)]
    return times[WARM:], sum(times[:WARM]), torch.cuda.memory_reserved() - before if ids.is_cuda else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--context", type=int, default=2048, help="tokens prefilled")
    parser.add_argument("--batch", type=int, default=1, help="rows, all the same length")
    parser.add_argument("--steps", type=int, default=48, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each over all caches in turn")
    parser.add_argument("--caches", nargs="+", default=[BASELINE, "fp16", "0.5", "0.3", "quanto:4"])
    parser.add_argument(
        "--fill", action="store_true", help="random keys and values in the place of a prefill, for very long contexts"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="steps of generate(), which compiles them for caches of fixed capacity; not for dynamic",
    )
    parser.add_argument(
        "--prefill",
        nargs="?",
        type=int,
        const=0,
        metavar="CHUNK",
        help="time prefills, with all that compressing takes, in the place of steps; in chunks of so many tokens",
    )
    parser.add_argument("--fixed", action="store_true", help="caches of fixed capacity for --prefill, too")
    parser.add_argument(
        "--no-cudnn",
        action="store_true",
        help="keep SDPA from cuDNN, which PyTorch prefers on some GPUs and which plans anew for every length",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn)
    try:
        check_folders(args.json)
        model, tokenizer = load_from(args)
        names = [BASELINE, *(name for name in args.caches if name != BASELINE)]
        fixed = args.compile or args.fixed
        capacity = args.context + WARM + args.steps + 1 if fixed else None
        makers = {name: cache_maker(name, model, capacity, tokenizer) for name in names}
        caches = {name: make() for name, make in makers.items()}
    except (ImportError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None

    if tokenizer is None:
        ids = torch.randint(model.config.vocab_size, (args.batch, args.context))
    else:
        once = tokenizer(passage(), return_tensors="pt", verbose=False).input_ids
        ids = once.repeat(args.batch, -(-args.context // once.shape[1]))[:, : args.context]
    ids = ids.to(model.device)
    own_attention = model.config._attn_implementation
    medians: dict[str, list[float]] = {name: [] for name in makers}
    warm: dict[str, list[float]] = {name: [] for name in makers}
    stored: dict[str, int] = {}
    peaks: dict[str, int] = {}
    with tqdm(total=args.rounds * len(makers), desc="decode", disable=None) as bar:
        for turn in range(1, args.rounds + 1):
            for name, make in makers.items():
                if ids.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                cache = caches.pop(name, None) or make()
                held = torch.cuda.memory_allocated() if ids.is_cuda else 0
                try:
                    if args.prefill is not None:
                        times = [prefill_time(model, ids, cache, args.prefill)]
                    elif args.compile:
                        attention = STATIC.get(name, own_attention)
                        if model.config._attn_implementation != attention:
                            model.set_attn_implementation(attention)
                        everywhere = not ids.is_cuda
                        times, first, peaks[name] = generate_times(model, ids, cache, args.steps, args.fill, everywhere)
                        warm[name].append(first)
                    else:
                        times = decode_times(model, ids, cache, args.steps, args.fill)
                    medians[name].append(statistics.median(times))
                except torch.OutOfMemoryError:
                    medians[name].append(math.inf)
                with tqdm.external_write_mode():  # a run that is cut short has shown what it measured
                    print(f"round {turn}: {name} {1e3 * medians[name][-1]:.2f} ms", file=sys.stderr, flush=True)
                if ids.is_cuda and not args.compile:
                    peaks[name] = torch.cuda.max_memory_allocated() - held
                stored[name] = 0 if isinstance(cache, QuantizedCache | StaticCache) else cache_memory(cache).stored
                if args.compile and name != BASELINE:  # the same object again: StaticCache compiles anew for another
                    cache.reset()
                    caches[name] = cache
                del cache
                bar.update()

    about = environment(model)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{args.model}, batch {args.batch}, {args.context} tokens of context, "
        f"{args.rounds} rounds of {args.steps} steps\n"
    )
    rows, tokens = {}, args.batch * (1 if args.prefill is None else args.context)
    for name, seconds in medians.items():
        fits = math.isfinite(max(seconds))
        ratios = [base / own for base, own in zip(medians[BASELINE], seconds, strict=True)]
        compared = fits and math.isfinite(max(ratios))
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(seconds) if fits else None,
            "tokens_per_second": tokens / statistics.median(seconds) if fits else None,
            "speed_over_dynamic": statistics.median(ratios) if compared else None,
            "lowest": min(ratios) if compared else None,
            "highest": max(ratios) if compared else None,
            "stored_bytes": stored[name] or None,
            "peak_bytes": peaks.get(name) or None,
            "first_steps_seconds": warm[name] or None,
        }

    def shown(value: float | None, form: str, unit: float = 1) -> str:
        return "-" if value is None else format(value / unit, form)

    unit = "ms/step" if args.prefill is None else "ms/prefill"
    print_table(
        ["cache", unit, "tokens/s", f"x {BASELINE}", "lowest", "highest", "cache GiB", "peak GiB", "first s"],
        [
            [name]
            + [shown(row[key], ".1f") for key in ("milliseconds", "tokens_per_second")]
            + [shown(row[key], ".2f") for key in ("speed_over_dynamic", "lowest", "highest")]
            + [shown(row[key], ".2f", 2**30) for key in ("stored_bytes", "peak_bytes")]
            + [" ".join(f"{seconds:.1f}" for seconds in row["first_steps_seconds"] or ()) or "-"]
            for name, row in rows.items()
        ],
    )
    if any(row["peak_bytes"] for row in rows.values()):
        print(f"peak: beside {'model and cache' if args.compile else 'the model'}")
    if any(row["milliseconds"] is None for row in rows.values()):
        print("-: out of memory")
    if args.json:
        report = {"environment": about, "settings": settings_of(args), "results": rows}
        write_whole(args.json, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
