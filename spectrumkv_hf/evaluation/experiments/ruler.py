"""Tasks after RULER, by method, task and length."""

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from spectrumkv_hf.evaluation.experiments.experiment import SPEC, Experiment, Run, Table, join, methods_from
from spectrumkv_hf.evaluation.protocols.needles import ask_over, summarised
from spectrumkv_hf.evaluation.protocols.ruler import TASKS, ruler_prompt
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.subjects.methods import Method


class Ruler(Experiment):
    """A cell is a method on one prompt: what was said, and what it had to hold."""

    name = "ruler"
    title = "Tasks after RULER"
    about = (
        "Retrieval (one number; one among others; four of one key), tracking of variables and aggregation (common and "
        "frequent words), as RULER (arXiv 2404.06654) has them, in our wording. The score is the mean share of the "
        "answers that were said. A model that fails over the exact cache says nothing about others."
    )
    depends = ("asked", "recent_window")
    reduced: Mapping[str, Any] = {
        "tasks": ["single", "variables"],
        "lengths": [512],
        "samples": 1,
        "methods": ["sink_protect:0.3"],
    }
    reads_text = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            nargs="+",
            default=["sink_protect:0.5", "sink_protect:0.3", "calibrated:0.25", "kivi:4", "turboquant:4"],
            metavar=SPEC,
            help="beside the exact cache",
        )
        parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="which")
        parser.add_argument("--lengths", nargs="+", type=int, default=[4096], help="tokens of the prompts")
        parser.add_argument("--samples", type=int, default=5, help="prompts of each task and length")
        parser.add_argument(
            "--asked",
            choices=("after", "before"),
            default="after",
            help="the question follows the compressed context, or is part of it and guides the ranking",
        )
        parser.add_argument("--recent-window", type=int, default=0, metavar="N", help="of the policies")

    def check(self, args: argparse.Namespace) -> None:
        if args.samples < 1 or min(args.lengths) < 1:
            raise ValueError("--samples and --lengths are 1 or more")
        args.methods = list(dict.fromkeys(["exact", *args.methods]))
        methods_from(args)

    def _prompts(self, run: Run) -> Iterator[tuple[str, int, int]]:
        """Task, length and number of each prompt."""
        for task in run.args.tasks:
            for length in run.args.lengths:
                for number in range(run.args.samples):
                    yield task, length, number

    def measure(self, run: Run) -> None:
        jobs = [(method, *prompt) for prompt in self._prompts(run) for method in run.methods]
        for method, task, length, number in run.bar(jobs):
            measure = partial(self._cell, run, method, task, length, number)
            run.cell(method.spec, task, length, number, measure=measure)

    def _cell(self, run: Run, method: Method, task: str, length: int, number: int) -> Cell:
        prompt = ruler_prompt(run.words, task, length, number)
        before = run.args.asked == "before"
        said = ask_over(run.model, run.words, method, prompt.prompts, prompt.new_tokens, before)
        return {
            "text": said.texts[0],
            "answers": list(prompt.answers),
            "actual_ratio": said.memory.actual_ratio,
            "nominal_ratio": said.memory.nominal_ratio,
        }

    def _cells(self, run: Run, spec: str, task: str, length: int) -> list[Cell]:
        return [run.results.cells[join((spec, task, length, number))] for number in range(run.args.samples)]

    def measured(self, run: Run, spec: str, task: str, length: int) -> dict[str, Any]:
        """Of a method on the prompts of a task and length."""
        cells = self._cells(run, spec, task, length)
        said = [(cell["text"], answer) for cell in cells for answer in cell["answers"]]
        return summarised(said, [cell["actual_ratio"] for cell in cells])

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        args = run.args
        return [
            {"method": spec, "task": task, "tokens": length, **self.measured(run, spec, task, length)}
            for spec in args.methods
            for task in args.tasks
            for length in args.lengths
        ]

    def table(self, run: Run) -> Table:
        args, rows = run.args, []
        for length in args.lengths:
            for spec in args.methods:
                measured = [self.measured(run, spec, task, length) for task in args.tasks]
                scores = [100 * each["needle_recall"]["recall"] for each in measured]
                bytes_ = fmean(each["kv_memory"]["ratio"] for each in measured)
                shown = [f"{score:.0f}" for score in (*scores, fmean(scores))]
                rows.append([spec, str(length), f"{bytes_:.3f}", *shown])
        return Table(["method", "tokens", "actual", *args.tasks, "mean"], rows)
