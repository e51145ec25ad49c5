"""Access skew: the Gini coefficient of attention over tokens, by layer."""

import argparse
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch

from spectrumkv_hf.evaluation.experiments.experiment import Experiment, Run, Table, join
from spectrumkv_hf.evaluation.protocols.skew import attention_mass, gini
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell

KINDS = {
    "received": "all that a token receives, heads added",
    "per_query": "the same per query that can see it",
    "per_head": "the same, mean of the heads' own coefficients",
    "top_share": "share of what is received that falls on a twentieth of the tokens",
}


class AccessSkew(Experiment):
    """A cell is one window: the coefficients of every layer."""

    name = "access-skew"
    title = "Skew of attention over tokens"
    about = (
        "The paper's motivation. A causal model's early tokens are seen by more queries, which alone gives a skew; "
        "'per query' divides by their number."
    )
    depends = ("tokens",)
    reduced: Mapping[str, Any] = {"dataset": "passage", "tokens": 256, "windows": 1}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tokens", type=int, default=1024, help="of a window")
        parser.add_argument("--windows", type=int, default=4, help="non-overlapping windows of the text")

    def check(self, args: argparse.Namespace) -> None:
        if args.tokens < 20 or args.windows < 1:
            raise ValueError("--tokens is 20 or more, --windows 1 or more")

    def measure(self, run: Run) -> None:
        for index, ids in run.bar(list(enumerate(run.windows(run.args.tokens)))):
            run.cell(index, measure=partial(self._cell, run, ids))

    def _cell(self, run: Run, ids: torch.Tensor) -> Cell:
        tokens = ids.shape[1]
        layers = []
        for layer, mass in sorted(attention_mass(run.model, ids).items()):
            per_query = mass / torch.arange(tokens, 0, -1, device=mass.device)
            received = mass.sum(0)
            top = received.topk(max(tokens // 20, 1)).values.sum() / received.sum()
            layers.append(
                {
                    "layer": layer,
                    "received": float(gini(received)),
                    "per_query": float(gini(per_query.sum(0))),
                    "per_head": float(gini(per_query).mean()),
                    "top_share": float(top),
                }
            )
        return {"layers": layers}

    def _means(self, run: Run) -> list[dict[str, Any]]:
        windows = [run.results.cells[join((index,))]["layers"] for index in range(run.args.windows)]
        return [
            {"layer": same[0]["layer"]} | {kind: fmean(each[kind] for each in same) for kind in KINDS}
            for same in zip(*windows, strict=True)
        ]

    def table(self, run: Run) -> Table:
        layers = self._means(run)
        rows = []
        for kind, meaning in KINDS.items():
            values = [layer[kind] for layer in layers]
            numbers = [f"{value:.3f}" for value in (fmean(values), min(values), max(values))]
            rows.append([f"{kind}: {meaning}", *numbers])
        return Table(["Gini coefficient", "mean of layers", "lowest", "highest"], rows)

    def figure(self, run: Run) -> "figures.Figure":
        figure, axes = figures.new_figure(self.title)
        curves = {kind: [(x["layer"], x[kind]) for x in self._means(run)] for kind in KINDS}
        figures.lines(axes[0], curves)
        axes[0].set_xlabel("layer")
        axes[0].set_ylabel("Gini coefficient, or share")
        axes[0].set_ylim(0, 1)
        figures.legend_below(figure, axes[0], figures.label_ends(axes[0], curves))
        return figure
