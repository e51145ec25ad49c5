"""KL and perplexity of a continuation over each method's cache."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

from spectrumkv_hf.evaluation.experiments.experiment import SPEC, Experiment, Run, Table, join, methods_from
from spectrumkv_hf.evaluation.protocols.quality import (
    Quality,
    Summary,
    continuation_quality,
    exact_logits,
    summarise,
)
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.report.tables import shown
from spectrumkv_hf.evaluation.subjects.methods import Method, at_budgets


@dataclass(frozen=True, kw_only=True)
class Perplexity(Experiment):
    """Methods beside each other on the same continuations; `variants` has the lists of methods.

    Attributes:
        methods: Specs compared by default, beside `families` at `budgets`.
        contexts: Tokens prefilled.
        continuation: Tokens scored.
        windows: Of the text, for each context.
        draw: Of the summaries.
    """

    name: str
    title: str
    about: str
    draw: figures.Draw
    methods: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    contexts: tuple[int, ...] = (2048,)
    continuation: int = 512
    windows: int = 10
    reduced: Mapping[str, Any] = field(default_factory=dict)

    depends = ("continuation", "recent_window")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            nargs="*",
            default=list(self.methods),
            metavar=SPEC,
            help="policies of the library, paper_ and one of them, or another method with what it takes",
        )
        parser.add_argument(
            "--families", nargs="*", default=list(self.families), metavar="SPEC", help="methods at every budget"
        )
        parser.add_argument("--budgets", nargs="*", type=float, default=list(self.budgets), help="of the families")
        parser.add_argument(
            "--contexts", "--context", nargs="+", type=int, default=list(self.contexts), help="tokens prefilled"
        )
        parser.add_argument("--continuation", type=int, default=self.continuation, help="tokens scored on the cache")
        parser.add_argument("--windows", type=int, default=self.windows, help="non-overlapping windows of the text")
        parser.add_argument(
            "--recent-window",
            type=int,
            default=0,
            metavar="N",
            help="last tokens that policies keep exact outside the budget; 0: all have the same nominal budget",
        )

    def check(self, args: argparse.Namespace) -> None:
        if min(args.contexts) < 1 or args.continuation < 2 or args.windows < 1:
            raise ValueError("--contexts and --windows are 1 or more, --continuation is 2 or more")
        args.methods = list(dict.fromkeys([*args.methods, *at_budgets(args.families, args.budgets)]))
        if not methods_from(args):
            raise ValueError("no method is given: --methods, or --families with --budgets")

    def measure(self, run: Run) -> None:
        args = run.args
        texts = {context: run.windows(context + args.continuation) for context in args.contexts}

        @lru_cache(maxsize=1)  # the methods of a window take turns, and logits are large
        def exact(context: int, index: int) -> torch.Tensor:
            return exact_logits(run.model, texts[context][index], context)

        def quality(context: int, index: int, method: Method) -> Cell:
            logits = exact(context, index)
            return asdict(continuation_quality(run.model, texts[context][index], context, method, logits))

        jobs = [(c, index, method) for c in args.contexts for index in range(args.windows) for method in run.methods]
        for context, index, method in run.bar(jobs):
            run.cell(context, index, method.spec, measure=partial(quality, context, index, method))

    def summaries(self, run: Run) -> list[Summary]:
        """Of every method at every context, in the order of the arguments."""
        cells, windows = run.results.cells, range(run.args.windows)
        return [
            summarise(spec, context, [Quality(**cells[join((context, i, spec))]) for i in windows])
            for context in run.args.contexts
            for spec in run.args.methods
        ]

    def table(self, run: Run) -> Table:
        rows, measured = [], self.summaries(run)
        for context in run.args.contexts:
            summaries = [summary for summary in measured if summary.context == context]
            exact = summaries[0].mean.exact_perplexity
            rows.append(["exact (DynamicCache)", str(context), "", "1.000", "0", "", "100", f"{exact:.3f}", "0", ""])
            for spec, _, mean, kl_error, change, change_error, _ in summaries:
                ratios = [f"{mean.actual_ratio:.3f}", f"{mean.nominal_ratio:.3f}"]
                kl = [f"{mean.kl:.5f}", shown(kl_error, ".5f")]
                same = "" if mean.agreement is None else f"{100 * mean.agreement:.1f}"
                rows.append([spec, str(context), *ratios, *kl, same, f"{mean.perplexity:.3f}"])
                rows[-1] += [f"{change:+.2f}", shown(change_error, ".2f")]
        header = ["method", "context", "actual", "nominal", "KL (nats)", "±", "top-1 %", "PPL", "ΔPPL %", "±"]
        return Table(header, rows)

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        return [{"method": s.spec, "context": s.context, **s.metrics} for s in self.summaries(run)]

    def figure(self, run: Run) -> "figures.Figure":
        return self.draw(self.title, self.summaries(run))
