"""How much a compressed cache changes a model's predictions, against the exact cache.

The transfer protocol: prefill `context` tokens in one forward, which compresses the cache; then one forward with the
whole continuation on that cache (teacher forcing).

    python examples/quality.py --policies sink_protect:0.5 sink_protect:0.3 uniform_int4 paper_greedy:0.3
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from spectrumkv_hf.evaluation.environment import environment
from spectrumkv_hf.evaluation.methods import parse_method
from spectrumkv_hf.evaluation.models import add_model_arguments, load_from
from spectrumkv_hf.evaluation.report import HelpFormatter, check_folders, print_table
from spectrumkv_hf.evaluation.text import add_text_arguments, text_from, text_windows
from spectrumkv_hf.evaluation.transfer import Quality, measure


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
    add_text_arguments(parser, dataset=None)
    parser.add_argument("--context", type=int, default=1024, help="tokens prefilled")
    parser.add_argument("--continuation", type=int, default=256, help="tokens scored on the compressed cache")
    parser.add_argument("--windows", type=int, default=1, help="non-overlapping windows of the text")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["sink_protect:0.5", "sink_protect:0.3", "uniform_int8", "uniform_int4", "paper_greedy:0.3"],
        metavar="NAME[:BUDGET[:CODEC[:IMPORTANCE[:SCOPE]]]]",
        help="policies of the library, or paper_ and one of them",
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
        methods = [parse_method(spec, args.recent_window) for spec in args.policies]
        text = text_from(args)
        model, tokenizer = load_from(args)
        windows = text_windows(tokenizer, text, args.context + args.continuation, args.windows)
        for method in methods:
            method.cache(model)  # reports what this model cannot have before anything runs
    except (ImportError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None

    about = environment(model)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{args.model}: {args.windows} windows of {args.context} tokens of context and {args.continuation} scored\n")
    results = measure(model, windows, args.context, methods)
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
