"""Needle retrieval by depth and budget."""

import argparse
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from spectrumkv_hf.evaluation.experiments.experiment import SPEC, Experiment, Run, Table, join, methods_from
from spectrumkv_hf.evaluation.protocols.needles import DEPTHS, ask_over, summarised
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.subjects.methods import (
    Method,
    Planned,
    Tiered,
    at_budgets,
    family_of,
    parse_method,
)
from spectrumkv_hf.probe.needles import NEEDLES, Needle, NeedlePrompts, found, needle_prompts

FAMILIES = ("sink_protect", "paper_greedy", "paper_balanced", "paper_two_tier", "drop_window", "drop_scored")
BUDGETS = (0.25, 0.3, 0.4, 0.5, 0.7)


class Needles(Experiment):
    """A cell is a method on one needle: which depths it was found at, and what was said."""

    name = "needles"
    title = "Needle in a haystack"
    about = (
        "The paper's retrieval table and heat map. Every token of the answer is predicted over the stored cache; the "
        "paper's first one came from exact logits. A model that fails over the exact cache says nothing about others."
    )
    depends = ("tokens", "depths", "asked", "max_new_tokens", "recent_window")
    reduced: Mapping[str, Any] = {
        "tokens": 384,
        "depths": [0.2, 0.8],
        "needles": 1,
        "families": ["sink_protect", "drop_window"],
        "budgets": [0.3],
        "max_new_tokens": 12,
    }
    reads_text = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--families", nargs="*", default=list(FAMILIES), metavar="SPEC", help="methods at every budget"
        )
        parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS), help="of the families")
        parser.add_argument("--methods", nargs="*", default=[], metavar=SPEC, help="methods with their own budget")
        parser.add_argument("--tokens", type=int, default=4096, help="of a prompt, the question included")
        parser.add_argument("--depths", nargs="+", type=float, default=list(DEPTHS), help="of the needle, 0 to 1")
        parser.add_argument("--needles", type=int, default=len(NEEDLES), help="the first so many")
        parser.add_argument(
            "--asked",
            choices=("after", "before"),
            default="after",
            help="the question follows the compressed context, or is part of it and guides the ranking",
        )
        parser.add_argument("--max-new-tokens", type=int, default=32, help="decoded greedily")
        parser.add_argument("--batch", type=int, default=len(DEPTHS), help="rows at once")
        parser.add_argument("--recent-window", type=int, default=0, metavar="N", help="of the policies")

    def check(self, args: argparse.Namespace) -> None:
        if not 1 <= args.needles <= len(NEEDLES):
            raise ValueError(f"--needles is 1 to {len(NEEDLES)}, got {args.needles}")
        if args.tokens < 1 or args.batch < 1 or args.max_new_tokens < 1:
            raise ValueError("--tokens, --batch and --max-new-tokens are 1 or more")
        if not all(0 <= depth <= 1 for depth in args.depths):
            raise ValueError(f"--depths are fractions from 0 to 1, got {args.depths}")
        specs = ["exact", *args.methods, *at_budgets(args.families, args.budgets)]
        args.methods = list(dict.fromkeys(specs))
        methods_from(args)

    def measure(self, run: Run) -> None:
        args = run.args
        prompts = [
            (needle, needle_prompts(run.words, needle, args.depths, args.tokens)) for needle in NEEDLES[: args.needles]
        ]
        jobs = [(method, needle, each) for method in run.methods for needle, each in prompts]
        for method, needle, each in run.bar(jobs):
            run.cell(method.spec, needle.answer, measure=partial(self._cell, run, method, needle, each))

    def _cell(self, run: Run, method: Method, needle: Needle, prompts: NeedlePrompts) -> Cell:
        texts: list[str] = []
        for rows in prompts.ids.split(run.args.batch):
            answers = ask_over(
                run.model,
                run.words,
                method,
                prompts._replace(ids=rows),
                run.args.max_new_tokens,
                run.args.asked == "before",
            )
            texts += answers.texts
        memory = answers.memory
        return {
            "found": found(texts, needle.answer),
            "texts": texts,
            "actual_ratio": memory.actual_ratio,
            "nominal_ratio": memory.nominal_ratio,
        }

    def _cells(self, run: Run, spec: str) -> list[Cell]:
        return [run.results.cells[join((spec, needle.answer))] for needle in NEEDLES[: run.args.needles]]

    def measured(self, run: Run, spec: str) -> dict[str, dict[str, Any]]:
        """Of a method, over needles and depths."""
        cells = self._cells(run, spec)
        said = [
            (text, needle.answer)
            for needle, cell in zip(NEEDLES[: run.args.needles], cells, strict=True)
            for text in cell["texts"]
        ]
        return summarised(said, [cell["actual_ratio"] for cell in cells])

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        return [{"method": spec, **self.measured(run, spec)} for spec in run.args.methods]

    def table(self, run: Run) -> Table:
        rows = []
        for spec in run.args.methods:
            measured = self.measured(run, spec)
            recall, memory = measured["needle_recall"], measured["kv_memory"]
            nominal = fmean(cell["nominal_ratio"] for cell in self._cells(run, spec))
            found = [f"{recall['found']}/{recall['total']}", f"{100 * recall['recall']:.1f}"]
            rows.append([spec, f"{memory['ratio']:.3f}", f"{nominal:.3f}", *found])
        return Table(["method", "actual", "nominal", "found", "%"], rows)

    def figure(self, run: Run) -> "figures.Figure":
        families: dict[str, list[str]] = {}
        for spec in run.args.methods:
            families.setdefault(family_of(spec), []).append(spec)
        places = {}
        for spec in run.args.methods:
            measured = self.measured(run, spec)
            places[spec] = measured["kv_memory"]["ratio"], measured["needle_recall"]["recall"]
        curves = {family: [places[s] for s in specs] for family, specs in families.items() if family != "exact"}
        alone = [spec for specs in families.values() if len(specs) == 1 for spec in specs]  # they share a panel
        panels = {"one budget": alone, **{family: specs for family, specs in families.items() if len(specs) > 1}}
        columns = 4 if len(panels) > 3 else len(panels) + 1
        title = f"{self.title}: {run.args.tokens} tokens, asked {run.args.asked}"
        figure, axes = figures.new_figure(title, columns, -(-(len(panels) + 1) // columns), width=2.7, height=3)
        figures.lines(axes[0], curves)
        axes[0].axhline(places["exact"][1], color="black", linestyle="--", linewidth=1, label="exact")
        axes[0].set(xlabel="stored bytes over FP16", ylabel="found", ylim=(-0.03, 1.03))
        figures.legend_below(figure, axes[0])
        every = 2 if len(run.args.depths) > 9 else 1
        depths = [f"{d:g}" if index % every == every - 1 else "" for index, d in enumerate(run.args.depths)]
        for each, (family, specs) in zip(axes[1:], panels.items(), strict=False):
            found_at = [
                [fmean(hits) for hits in zip(*(cell["found"] for cell in self._cells(run, spec)), strict=True)]
                for spec in specs
            ]
            names = specs if family == "one budget" else [_budget(spec) for spec in specs]
            image = each.imshow(list(zip(*found_at, strict=True)), vmin=0, vmax=1, aspect="auto")
            each.set_xticks(range(len(names)), names)
            each.set_yticks(range(len(depths)), depths)
            each.set_title(family, fontsize="medium")
            each.set(xlabel="method" if family == "one budget" else "budget", ylabel="depth")
        for each in axes[len(panels) + 1 :]:
            each.remove()
        figure.colorbar(image, ax=axes[1 : len(panels) + 1], label="found")
        return figure


def _budget(spec: str) -> str:
    """The budget of a spec's policy; of other methods the whole spec."""
    method = parse_method(spec)
    return f"{method.budget:g}" if isinstance(method, Tiered | Planned) else spec
