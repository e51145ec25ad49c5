"""Long greedy decoding over each method's cache of a prompt, against the exact cache."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from statistics import fmean, median_low
from typing import Any

import torch

from spectrumkv_hf.evaluation.experiments.experiment import SPEC, Experiment, Run, Table, join, methods_from
from spectrumkv_hf.evaluation.protocols.decoding import Decoded, Departure, departures, exact_run, summarised
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.report.tables import shown
from spectrumkv_hf.evaluation.subjects.methods import Method


class Generation(Experiment):
    """A cell is a method after prompts of one length: how far each of its runs lies from the exact one."""

    name = "generation"
    title = "Long greedy generation"
    about = (
        "A run over each method's cache of a prompt, one token after the other, against the run over the exact cache: "
        "the first token that differs (median over the prompts) and the share of equal tokens. KL and top-1 agreement "
        "are those of a second run, which is given the exact run's tokens, so that they stay comparable to the end. "
        "Texts do not end early. The row fp16 is our cache without compression: in 16 bits it differs by the order of "
        "sums alone. Repeated: tokens that end eight in a row which the run had before; in a loop all methods agree."
    )
    depends = ("tokens", "bucket", "windows", "recent_window")
    reduced: Mapping[str, Any] = {
        "dataset": "passage",
        "contexts": [256],
        "tokens": 96,
        "bucket": 32,
        "windows": 1,
        "methods": ["sink_protect:0.3"],
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            nargs="+",
            default=["fp16", "sink_protect:0.5", "sink_protect:0.3", "calibrated:0.25", "kivi:4", "turboquant:4"],
            metavar=SPEC,
            help="beside the exact cache",
        )
        parser.add_argument("--contexts", "--context", nargs="+", type=int, default=[2048], help="tokens of a prompt")
        parser.add_argument("--tokens", type=int, default=512, help="decoded after each prompt")
        parser.add_argument("--bucket", type=int, default=128, help="tokens of which KL and agreement are averaged")
        parser.add_argument("--windows", type=int, default=4, help="prompts, non-overlapping windows of the text")
        parser.add_argument("--batch", type=int, default=4, help="prompts at once")
        parser.add_argument("--recent-window", type=int, default=0, metavar="N", help="of the policies")

    def check(self, args: argparse.Namespace) -> None:
        if min(args.contexts) < 2 or min(args.tokens, args.bucket, args.windows, args.batch) < 1:
            raise ValueError("--contexts are 2 or more, --tokens, --bucket, --windows and --batch 1 or more")
        if args.tokens % args.bucket:
            raise ValueError(f"--tokens {args.tokens} is no multiple of --bucket {args.bucket}")
        args.methods = list(dict.fromkeys(["exact", *args.methods]))
        methods_from(args)

    def measure(self, run: Run) -> None:
        args = run.args
        prompts = {context: torch.cat(run.windows(context)).split(args.batch) for context in args.contexts}

        @lru_cache(maxsize=1)  # the methods after a prompt take turns, and logits are large
        def exact(context: int) -> list[Decoded]:
            return [exact_run(run.model, rows, args.tokens) for rows in prompts[context]]

        def cell(context: int, method: Method) -> Cell:
            measured = [
                departures(run.model, rows, method, meant, args.bucket)
                for rows, meant in zip(prompts[context], exact(context), strict=True)
            ]
            rows, prefilled, final = zip(*measured, strict=True)
            return {
                "prompts": [asdict(row) for batch in rows for row in batch],
                "actual_ratio": [memory.actual_ratio for memory in prefilled],
                "final_ratio": [memory.actual_ratio for memory in final],
            }

        for context, method in run.bar([(context, method) for context in args.contexts for method in run.methods]):
            run.cell(context, method.spec, measure=partial(cell, context, method))

    def measured(self, run: Run, context: int, spec: str) -> dict[str, Any]:
        """Of a method after the prompts of one length."""
        cell = run.results.cells[join((context, spec))]
        return summarised([Departure(**row) for row in cell["prompts"]], cell["actual_ratio"], cell["final_ratio"])

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        return [
            {"method": spec, "context": context, **self.measured(run, context, spec)}
            for context in run.args.contexts
            for spec in run.args.methods
        ]

    def table(self, run: Run) -> Table:
        args, rows = run.args, []
        for context in args.contexts:
            for spec in args.methods:
                measured = self.measured(run, context, spec)
                whole, buckets = measured["kv_divergence"], measured["buckets"]
                bytes_ = [f"{measured[name]['ratio']:.3f}" for name in ("kv_memory", "kv_memory_at_end")]
                first = median_low(args.tokens if at is None else at for at in measured["first"])
                equal = f"{measured['first'].count(None)}/{len(measured['first'])}"
                rows.append([spec, str(context), *bytes_, "none" if first == args.tokens else str(first), equal])
                rows[-1] += [f"{100 * fmean(measured['same']):.1f}", f"{100 * fmean(measured['repeated']):.1f}"]
                rows[-1] += [f"{whole['kl']:.5f}", shown(whole["kl_error"], ".5f")]
                rows[-1] += [f"{buckets[at]['kl']:.5f}" for at in (0, -1)] + [f"{100 * whole['agreement']:.1f}"]
        header = ["method", "prompt", "actual", "at end", "first different", "equal runs", "same %", "repeated %"]
        return Table(header + ["KL (nats)", "±", f"first {args.bucket}", f"last {args.bucket}", "top-1 %"], rows)

    def figure(self, run: Run) -> "figures.Figure":
        args = run.args
        figure, axes = figures.new_figure(f"{self.title}, {args.tokens} tokens", 2, len(args.contexts), height=3.5)
        for row, context in enumerate(args.contexts):
            kl, agreement = axes[2 * row : 2 * row + 2]
            buckets = {spec: self.measured(run, context, spec)["buckets"] for spec in args.methods if spec != "exact"}
            ends = [args.bucket * (at + 1) for at in range(args.tokens // args.bucket)]
            for each, name in ((kl, "kl"), (agreement, "agreement")):
                curves = {s: [*zip(ends, (b[name] for b in held), strict=True)] for s, held in buckets.items()}
                figures.lines(each, curves)
                each.set_title(f"prompt of {context} tokens", fontsize="medium")
                each.set_xlabel("tokens decoded")
            if any(bucket["kl"] > 0 for held in buckets.values() for bucket in held):
                figures.log_scale(kl, "y")
            kl.set_ylabel("KL to the exact cache, nats")
            agreement.set_ylabel("top-1 agreement")
        figures.legend_below(figure, axes[0])
        return figure
