"""Perplexity under the paper's own protocol, to see whether its numbers come out."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from spectrumkv_hf.evaluation.experiments.experiment import Experiment, Run, Table, join
from spectrumkv_hf.evaluation.protocols.fake_quantisation import fake_quantised_loss, perplexity_change, projections
from spectrumkv_hf.evaluation.protocols.quality import with_error
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.report.tables import shown
from spectrumkv_hf.evaluation.subjects.methods import Tiered, at_budgets, family_of, parse_method
from spectrumkv_hf.policy import Policy

FAMILIES = ("greedy", "sink_protect", "balanced", "random", "two_tier", "drop_window", "drop_scored")
BUDGETS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.75)


class PaperPerplexity(Experiment):
    """A cell is a policy on one window, `exact` among them."""

    name = "paper-perplexity"
    title = "The paper's protocol: fake quantisation before RoPE in one forward"
    about = (
        "The paper's main table. drop_window (its PDTrim) and drop_scored (its SWS) are scored on the tokens that they "
        "keep, so their rows can't be compared with the others; two_tier hides what it drops from attention."
    )
    depends = ("tokens",)
    reduced: Mapping[str, Any] = {
        "dataset": "passage",
        "tokens": 256,
        "windows": 1,
        "families": ["greedy", "random", "drop_window"],
        "budgets": [0.3, 0.5],
        "policies": [],
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--families", nargs="*", default=list(FAMILIES), metavar="POLICY", help="at every budget")
        parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS), help="nominal, of the families")
        parser.add_argument(
            "--policies",
            nargs="*",
            default=["uniform_int8", "uniform_int4"],
            metavar="NAME[:BUDGET]",
            help="with a budget of their own",
        )
        parser.add_argument("--tokens", type=int, default=2048, help="of a window")
        parser.add_argument("--windows", type=int, default=5, help="non-overlapping, from the start of the text")

    def check(self, args: argparse.Namespace) -> None:
        if args.tokens < 8 or args.windows < 1:
            raise ValueError("--tokens is 8 or more, --windows 1 or more")
        args.policies = list(dict.fromkeys([*args.policies, *at_budgets(args.families, args.budgets)]))
        for spec in args.policies:
            _policy(spec)

    def measure(self, run: Run) -> None:
        projections(run.model)
        windows = run.windows(run.args.tokens)
        jobs = [(spec, index) for index in range(len(windows)) for spec in ("fp16", *run.args.policies)]
        for spec, index in run.bar(jobs):
            run.cell(index, spec, measure=partial(self._cell, run, windows[index], spec, index))

    def _cell(self, run: Run, ids: torch.Tensor, spec: str, index: int) -> Cell:
        policy = replace(_policy(spec), seed=index)  # the paper draws a new order for each window
        loss, nominal = fake_quantised_loss(run.model, ids, policy)
        return {"loss": loss, "nominal_ratio": nominal}

    def _losses(self, run: Run, spec: str) -> list[float]:
        return [run.results.cells[join((index, spec))]["loss"] for index in range(run.args.windows)]

    def table(self, run: Run) -> Table:
        exact = self._losses(run, "fp16")
        rows = [["exact", "1.000", f"{fmean(map(math.exp, exact)):.4f}", "0", ""]]
        for spec in run.args.policies:
            losses = self._losses(run, spec)
            _, error = with_error([100 * math.expm1(a - b) for a, b in zip(losses, exact, strict=True)])
            nominal = run.results.cells[join((0, spec))]["nominal_ratio"]
            change = f"{perplexity_change(losses, exact):+.2f}"
            rows.append([spec, f"{nominal:.3f}", f"{fmean(map(math.exp, losses)):.4f}", change, shown(error, ".2f")])
        return Table(["policy", "nominal", "PPL", "ΔPPL %", "±"], rows)

    def figure(self, run: Run) -> "figures.Figure":
        exact = self._losses(run, "fp16")
        curves: dict[str, list[tuple[float, float]]] = {}
        for spec in run.args.policies:
            point = (_policy(spec).budget, perplexity_change(self._losses(run, spec), exact))
            curves.setdefault(f"paper_{family_of(spec)}", []).append(point)
        figure, axes = figures.new_figure(self.title, width=8)
        figures.lines(axes[0], curves)
        figures.change_scale(axes[0])
        axes[0].set_xlabel("nominal budget")
        figures.legend_below(figure, axes[0], figures.label_ends(axes[0], curves))
        return figure


def _policy(spec: str) -> Policy:
    """A policy by name and budget, ranked as the paper's code does.

    Raises:
        ValueError: unknown, or more than a name and a budget.
    """
    method = parse_method(f"paper_{spec}")
    if not isinstance(method, Tiered):
        raise ValueError(f"{spec!r} is no policy")
    return method.policy
