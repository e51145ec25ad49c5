"""How much a compressed cache changes a model's predictions, against the exact cache.

The transfer protocol: prefill `context` tokens in one forward, which compresses the cache; then one forward with the
whole continuation on that cache (teacher forcing).

    python examples/quality.py --policies sink_protect:0.5 sink_protect:0.3 uniform_int4 paper_greedy:0.3
"""

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from models import HelpFormatter, add_model_arguments, check_folders, environment, load_from, passage
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from spectrumkv_hf import MemoryReport, Policy, SpectrumCache, get_policy

POSITIONS_AT_ONCE = 32
"""Distributions compared at a time: with 260k tokens in the vocabulary, 32 MiB for each float32 copy."""

ALIASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "paper_greedy": (
        "greedy",
        "absmax",
        {"importance": "positional", "scope": "token", "recent_window": 0, "sinks": 4},
    ),
}
"""Policy, codec and options by a name of their own: the Greedy of the paper's released code."""


@dataclass(frozen=True)
class Quality:
    """Predictions on a continuation, over a cache and over the exact one.

    Attributes:
        kl: Mean over the continuation of KL(exact || cache) of the next token's distribution, nats.
        loss: Mean negative log-likelihood of the continuation's tokens but the first, over the cache, nats.
        exact_loss: The same over the exact cache.
        actual_ratio: Bytes of the cache after the prefill, over two bytes an element.
        nominal_ratio: Mean nominal cost of its tokens.
    """

    kl: float
    loss: float
    exact_loss: float
    actual_ratio: float
    nominal_ratio: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def exact_perplexity(self) -> float:
        return math.exp(self.exact_loss)

    @property
    def perplexity_change(self) -> float:
        """In percent of the exact cache's."""
        return 100 * math.expm1(self.loss - self.exact_loss)

    @classmethod
    def mean(cls, windows: Sequence["Quality"]) -> "Quality":
        """Of windows of the same length; perplexities are then those of the mean log-likelihood."""
        fields = zip(*(asdict(window).values() for window in windows), strict=True)
        return cls(*(sum(values) / len(windows) for values in fields))


def cache_memory(cache: Cache) -> MemoryReport:
    """Bytes of a `SpectrumCache`, or of the tensors of a stock cache, whose tokens all cost 1."""
    if isinstance(cache, SpectrumCache):
        return cache.memory()
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return MemoryReport(sum(t.nbytes for t in held), sum(2 * t.numel() for t in held), nominal_ratio=1.0)


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> None:
    """Put the tokens `ids`, `[batch, tokens]`, into the cache in one forward."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only)


@torch.inference_mode()
def continuation_logits(model: PreTrainedModel, ids: torch.Tensor, context: int, cache: Cache) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of the tokens `ids[:, context:]` on a cache prefilled with those before."""
    return model(input_ids=ids[:, context:], past_key_values=cache, use_cache=True).logits[0]


def mean_kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over the rows of KL(exact || other), nats, of logits `[tokens, vocabulary]`."""
    total = 0.0
    for p, q in zip(exact.split(POSITIONS_AT_ONCE), other.split(POSITIONS_AT_ONCE), strict=True):
        log_p, log_q = log_softmax(p.float(), -1), log_softmax(q.float(), -1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total / len(exact)


def mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood, nats, of `ids[1:]` by the logits of the tokens before them."""
    total = 0.0
    for rows, targets in zip(logits[:-1].split(POSITIONS_AT_ONCE), ids[1:].split(POSITIONS_AT_ONCE), strict=True):
        picked = log_softmax(rows.float(), -1).gather(-1, targets[:, None])
        total -= float(picked.sum(dtype=torch.float64))
    return total / (len(ids) - 1)


def exact_logits(model: PreTrainedModel, ids: torch.Tensor, context: int) -> torch.Tensor:
    """`continuation_logits` on a `DynamicCache`."""
    cache = DynamicCache(config=model.config)
    prefill(model, ids[:, :context], cache)
    return continuation_logits(model, ids, context, cache)


def transfer_quality(
    model: PreTrainedModel,
    ids: torch.Tensor,
    context: int,
    make_cache: Callable[[], Cache],
    exact: torch.Tensor | None = None,
) -> Quality:
    """Compare a cache with the exact one under the transfer protocol.

    Args:
        model: In eval mode.
        ids: Tokens of one text, `[1, context + continuation]`, on the model's device.
        context: How many of them are prefilled.
        make_cache: Gives an empty cache.
        exact: `exact_logits` of the same arguments, where several caches are compared; None: computed here.

    Raises:
        ValueError: there are fewer than two tokens of continuation, or no context.
    """
    if not 1 <= context <= ids.shape[1] - 2:
        raise ValueError(f"{ids.shape[1]} tokens do not leave 2 or more after a context of {context}")
    if exact is None:
        exact = exact_logits(model, ids, context)
    cache = make_cache()
    prefill(model, ids[:, :context], cache)
    memory = cache_memory(cache)
    logits = continuation_logits(model, ids, context, cache)
    rest = ids[0, context:]
    return Quality(
        kl=mean_kl(exact, logits),
        loss=mean_loss(logits, rest),
        exact_loss=mean_loss(exact, rest),
        actual_ratio=memory.actual_ratio,
        nominal_ratio=memory.nominal_ratio,
    )


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int = 1) -> list[torch.Tensor]:
    """The first `count` non-overlapping windows of `length` tokens, `[1, length]` each.

    Every window starts with the token that the tokenizer begins a text with, if any.

    Raises:
        ValueError: the text is too short for them.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    start = ids[:1] if len(ids) and ids[0] == tokenizer.bos_token_id else ids[:0]
    windows = ids[len(start) :].split(length - len(start))
    whole = [torch.cat((start, w))[None] for w in windows if len(start) + len(w) == length]
    if len(whole) < count:
        raise ValueError(f"the text has {len(ids)} tokens: {len(whole)} windows of {length}, {count} wanted")
    return whole[:count]


def parse_policy(spec: str, recent_window: int | None = None) -> tuple[Policy, str]:
    """Policy and codec of `NAME[:BUDGET[:CODEC[:IMPORTANCE[:SCOPE]]]]`, where an empty field is the default.

    Args:
        spec: The name is one of `spectrumkv_hf.POLICIES`, or of `ALIASES`, which take a budget only.
        recent_window: For every policy but the aliases; None: its default.

    Raises:
        ValueError: too many fields, an unknown name, a value out of range.
    """
    name, *fields = spec.split(":")
    if len(fields) > (1 if name in ALIASES else 4):
        raise ValueError(f"policy {spec!r} has too many fields")
    budget, codec, importance, scope = (*fields, "", "", "", "")[:4]
    options: dict[str, Any] = {"importance": importance, "scope": scope}
    options = {key: value for key, value in options.items() if value}
    if recent_window is not None:
        options["recent_window"] = recent_window
    if name in ALIASES:
        name, codec, options = ALIASES[name]
    try:
        value = float(budget) if budget else None
    except ValueError:
        raise ValueError(f"policy {spec!r}: budget {budget!r} is no number") from None
    return get_policy(name, value, **options), codec or "spectrum"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *others)))


def measure(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    context: int,
    make_caches: dict[str, Callable[[], Cache]],
) -> dict[str, Quality]:
    """`transfer_quality` of every cache by its name, the mean over the windows."""
    results: dict[str, list[Quality]] = {name: [] for name in make_caches}
    with tqdm(total=len(windows) * (1 + len(make_caches)), desc="quality", disable=None) as bar:
        for ids in windows:
            ids = ids.to(model.device)
            exact = exact_logits(model, ids, context)
            bar.update()
            for name, make_cache in make_caches.items():
                results[name].append(transfer_quality(model, ids, context, make_cache, exact))
                bar.update()
    return {name: Quality.mean(qualities) for name, qualities in results.items()}


def quality_rows(results: dict[str, Quality]) -> Iterator[list[str]]:
    """Rows of the table, the exact cache's first."""
    exact = next(iter(results.values()))
    yield ["exact (DynamicCache)", "", "1.000", "0", f"{exact.exact_perplexity:.3f}", "0"]
    for name, q in results.items():
        ratios = [f"{q.actual_ratio:.3f}", f"{q.nominal_ratio:.3f}"]
        yield [name, *ratios, f"{q.kl:.5f}", f"{q.perplexity:.3f}", f"{q.perplexity_change:+.2f}"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--text-file", type=Path, help="held-out text, UTF-8; default: the examples' passage")
    parser.add_argument("--context", type=int, default=1024, help="tokens prefilled")
    parser.add_argument("--continuation", type=int, default=256, help="tokens scored on the compressed cache")
    parser.add_argument("--windows", type=int, default=1, help="non-overlapping windows of the text")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["sink_protect:0.5", "sink_protect:0.3", "uniform_int8", "uniform_int4", "paper_greedy:0.3"],
        metavar="NAME[:BUDGET[:CODEC[:IMPORTANCE[:SCOPE]]]]",
        help=f"policies of the library, or {', '.join(ALIASES)}[:BUDGET]",
    )
    parser.add_argument("--recent-window", type=int, metavar="N", help="of every policy; default: the policy's own")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        if args.context < 1 or args.continuation < 2 or args.windows < 1:
            raise ValueError("--context and --windows are 1 or more, --continuation is 2 or more")
        check_folders(args.json)
        policies = {spec: parse_policy(spec, args.recent_window) for spec in args.policies}
        text = args.text_file.read_text(encoding="utf-8") if args.text_file else passage()
        model, tokenizer = load_from(args)
        windows = text_windows(tokenizer, text, args.context + args.continuation, args.windows)

        def maker(policy: Policy, codec: str) -> Callable[[], Cache]:
            return lambda: SpectrumCache(config=model.config, policy=policy, codec=codec)

        make_caches = {spec: maker(*policy) for spec, policy in policies.items()}
        for make_cache in make_caches.values():
            make_cache()  # reports what this model cannot have before anything runs
    except (ImportError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None

    about = environment(model)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{args.model}: {args.windows} windows of {args.context} tokens of context and {args.continuation} scored\n")
    results = measure(model, windows, args.context, make_caches)
    print_table(["policy", "actual", "nominal", "KL (nats)", "PPL", "dPPL %"], list(quality_rows(results)))
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        rows = {
            name: asdict(q) | {"perplexity": q.perplexity, "perplexity_change_percent": q.perplexity_change}
            for name, q in results.items()
        }
        args.json.write_text(json.dumps({"environment": about, "settings": settings, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
