"""Generate the same answer over exact and compressed KV caches, and show what compression saves and costs.

python examples/generate.py --budgets 0.5 0.25 --plot tiers.png
"""

import argparse
import json
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from spectrumkv_hf import MemoryReport, SpectrumCache, cache_argument, get_policy
from spectrumkv_hf.evaluation.protocols.quality import Quality, measure, prefill
from spectrumkv_hf.evaluation.report.environment import environment, settings_of
from spectrumkv_hf.evaluation.report.figures import new_figure, save
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders, print_table
from spectrumkv_hf.evaluation.subjects.methods import Tiered, cache_memory
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.evaluation.subjects.text import text_windows
from spectrumkv_hf.policy import Calibrated
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.extras import required
from spectrumkv_hf.support.whole_file import write_whole

QUESTION = "Summarise the text above."
"""What the built-in prompt asks after the passage."""

WARM_UP = 256
"""Tokens of the prompt with which each cache is tried before anything is counted, so that kernels are compiled."""

COLUMN = 36
"""Least width of a printed text."""

EXACT = "DynamicCache"


class Clock(LogitsProcessor):
    """Notes the time at which each forward has given its logits, and leaves them as they are."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.times.append(time.perf_counter())
        return scores


@dataclass
class Generation:
    """What generating over one kind of cache gave, and its times in all counted rounds."""

    tokens: list[int] = field(default_factory=list)
    memory: MemoryReport = field(default_factory=lambda: MemoryReport(0, 0, 0, 0.0))
    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def prefill_seconds(self) -> float:
        return statistics.median(self.prefills)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: one over the median time of a token after the first."""
        return 1 / statistics.median(self.steps) if self.steps else float("nan")

    def run(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Cache, **options: Any) -> None:
        """Generate once more, greedily."""
        clock = Clock()
        started = time.perf_counter()
        output = model.generate(
            **inputs, **cache_argument(cache), do_sample=False, num_beams=1, logits_processor=[clock], **options
        )
        self.tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        self.memory = cache_memory(cache)
        self.prefills.append(clock.times[0] - started)
        self.steps += [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> dict[str, torch.Tensor]:
    """Model inputs for the prompt, through the chat template where there is one; None: the built-in prompt."""
    if prompt is None:
        prompt = f"{passage()}\n\n{QUESTION}"
    if not tokenizer.chat_template:
        return dict(tokenizer(prompt, return_tensors="pt"))
    message = [{"role": "user", "content": prompt}]
    return dict(
        tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    )


def generate_all(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    make_caches: dict[str, Callable[[], Cache]],
    rounds: int,
    **options: Any,
) -> dict[str, Generation]:
    """Generate over every cache in turn, `rounds` times, after a few tokens over each that are not counted."""
    results = {name: Generation() for name in make_caches}
    with tqdm(total=rounds * len(make_caches), desc="generation", disable=None) as bar:
        for make_cache in make_caches.values():
            start = {name: tensor[:, :WARM_UP] for name, tensor in inputs.items()}
            Generation().run(model, start, make_cache(), **options | {"max_new_tokens": 2})
        for _ in range(rounds):
            for name, make_cache in make_caches.items():
                results[name].run(model, inputs, make_cache(), **options)
                bar.update()
    return results


def departure(tokens: list[int], exact: list[int]) -> int | None:
    """After how many tokens they first differ, or None where they do not."""
    if tokens == exact:
        return None
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, exact, strict=False)))


def print_texts(tokenizer: PreTrainedTokenizerBase, results: dict[str, Generation]) -> None:
    """The generated texts side by side, with a bar where one departs from the exact cache's."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    exact = results[EXACT].tokens
    beside = max(1, (width + 3) // (COLUMN + 3))
    names = list(results)
    for group in (names[i : i + beside] for i in range(0, len(names), beside)):
        column = (width + 3) // len(group) - 3
        columns = []
        for name in group:
            result = results[name]
            text = tokenizer.decode(result.tokens, skip_special_tokens=True)
            at = departure(result.tokens, exact)
            note = f"{len(exact)} tokens" if name == EXACT else "the same tokens"
            if at is not None:
                note = f"departs after {at} tokens, at ||"
                same = len(tokenizer.decode(result.tokens[:at], skip_special_tokens=True))
                text = f"{text[:same]} || {text[same:].lstrip(' ')}"
            lines = [line for part in text.splitlines() for line in textwrap.wrap(part, column) or [""]]
            columns.append([name, note, "-" * column, *lines])
        for row in zip_longest(*columns, fillvalue=""):
            print(" | ".join(cell.ljust(column) for cell in row).rstrip())
        print()


def plot_tiers(path: Path, cache: SpectrumCache, title: str) -> None:
    """Draw the mean bits over the KV heads of every token (x) in every layer (y)."""
    maps = {layer: bits[0].float().mean(0).cpu() for layer, bits in cache.tier_map().items()}
    length = max((len(bits) for bits in maps.values()), default=1)
    rows = torch.full((len(cache.layers), length), torch.nan)
    for layer, bits in maps.items():
        rows[layer] = bits
    grey = "; grey: layers left as they are" if len(maps) < len(cache.layers) else ""
    figure, [axes] = new_figure(f"Bits per token after prefill: {title}{grey}", width=10, height=4)
    axes.set_facecolor("lightgrey")
    image = axes.imshow(rows.numpy(), aspect="auto", origin="lower", interpolation="nearest", vmin=0, vmax=16)
    legend = figure.colorbar(image, ax=axes, ticks=[0, 2, 4, 8, 16], label="mean over the KV heads")
    legend.ax.set_yticklabels(["dropped", "INT2", "INT4", "INT8", "FP16"])
    axes.set(xlabel="token of the prompt", ylabel="layer")
    save(figure, path)


def notes(model: PreTrainedModel, caches: list[SpectrumCache], repeats: int) -> list[str]:
    """What the numbers mean and what they do not."""
    policy = caches[0].policy
    meaning = "the mean nominal cost of the tokens, INT8 1/2 and INT4 1/4 of FP16"
    if isinstance(policy, Calibrated):
        meaning = "the share of FP16's bytes that compressed tokens take, scales and positions included"
    found = [
        f"Times: a LogitsProcessor's clock in generate(), caches in turn, {repeats} rounds after a short warm-up; "
        "medians. Other load on the machine shows in them. Prefill includes the compression and generate()'s set-up.",
        "KV MiB is everything the cache stores after generation, scales, positions and exact tokens included; times "
        f"smaller: than the model's own exact cache. The budget is {meaning}.",
        f"A longer text saves more: the last {policy.recent_window} tokens and up to 64 that wait to be compressed are "
        "exact and outside the budget.",
        "KL and perplexity are of one window of text: enough to see a difference between caches, not to rank them.",
    ]
    if model.dtype == torch.float32:
        found.insert(
            2,
            "The model is float32, whose exact cache takes four bytes an element. In 16 bits (--dtype bfloat16) it is "
            "half of that, the tiers are as here: the gain is about half.",
        )
    if model.device.type == "cpu":
        found.append("On the CPU a compiled kernel, or plain PyTorch, reads the tiers: speeds say nothing about CUDA.")
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="default: to summarise a text on the tides, 1700 tokens")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25], help="fractions of the FP16 bytes")
    parser.add_argument("--policy", help="of spectrumkv_hf.POLICIES; default: the plan of a probe")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=2, help="counted rounds of generation")
    parser.add_argument("--text-file", type=Path, help="held-out text, UTF-8; default: the examples' passage")
    parser.add_argument("--context", type=int, default=1024, help="tokens of it prefilled")
    parser.add_argument("--continuation", type=int, default=128, help="tokens of it scored on the compressed cache")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the tiers at the smallest budget")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        if args.max_new_tokens < 1 or args.repeats < 1 or args.context < 1 or args.continuation < 2:
            raise ValueError("--max-new-tokens, --repeats and --context are 1 or more, --continuation is 2 or more")
        check_folders(args.plot, args.json)
        if args.policy:  # complains before the model is loaded
            for budget in args.budgets:
                get_policy(args.policy, budget)
        if args.plot:
            required("matplotlib.figure", "--plot")
        text = args.text_file.read_text(encoding="utf-8") if args.text_file else passage()
        model, tokenizer = load_from(args)
        windows = text_windows(tokenizer, text, args.context + args.continuation)
        caches = [SpectrumCache.from_model(model, tokenizer, b, args.policy) for b in args.budgets]
        policies = {f"SpectrumCache b={b:g}": cache.policy for b, cache in zip(args.budgets, caches, strict=True)}
    except (ImportError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None

    def maker(policy: Any) -> Callable[[], Cache]:
        return lambda: SpectrumCache(config=model.config, policy=policy)

    ours = {name: maker(policy) for name, policy in policies.items()}
    inputs = {name: t.to(model.device) for name, t in encode_prompt(tokenizer, args.prompt).items()}
    about = environment(model)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{args.model}, prompt of {inputs['input_ids'].shape[1]} tokens\n{caches[0].summary()}\n")

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    every: dict[str, Callable[[], Cache]] = {EXACT: lambda: DynamicCache(config=model.config)} | ours
    results = generate_all(model, inputs, every, args.repeats, max_new_tokens=args.max_new_tokens, pad_token_id=pad)
    methods = [Tiered(name, policy) for name, policy in policies.items()]
    qualities: dict[str, Quality] = measure(model, windows, args.context, methods)
    print_texts(tokenizer, results)

    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        quality = qualities.get(name)
        rows.append(
            {
                "cache": name,
                "kv_mib": result.memory.stored / 2**20,
                "times_smaller": result.memory.times_smaller,
                "prefill_seconds": result.prefill_seconds,
                "decode_tokens_per_second": result.tokens_per_second,
                "kl_nats": quality.kl if quality else 0.0,
                "perplexity_change_percent": quality.perplexity_change if quality else 0.0,
                "actual_ratio": result.memory.actual_ratio,
                "nominal_ratio": result.memory.nominal_ratio,
                "departs_after_tokens": departure(result.tokens, results[EXACT].tokens),
                "text": tokenizer.decode(result.tokens, skip_special_tokens=True),
                "quality": asdict(quality) if quality else None,
            }
        )
    formats = ("", ".2f", ".2f", ".3f", ".1f", ".5f", "+.2f")
    print_table(
        ["cache", "KV MiB", "times smaller", "prefill s", "tokens/s", "KL (nats)", "dPPL %"],
        [[format(v, f) for v, f in zip(row.values(), formats, strict=False)] for row in rows],
    )
    remarks = notes(model, caches, args.repeats)
    print(
        "", *(textwrap.fill(remark, 118, initial_indent="* ", subsequent_indent="  ") for remark in remarks), sep="\n"
    )

    if args.plot:
        cache = min(caches, key=lambda cache: cache.policy.budget)
        prefill(model, inputs["input_ids"], cache)
        plot_tiers(args.plot, cache, f"{args.model}, {cache.policy.name}, budget {cache.policy.budget:g}")
    if args.json:
        report = {"environment": about, "settings": settings_of(args), "results": rows, "notes": remarks}
        write_whole(args.json, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
