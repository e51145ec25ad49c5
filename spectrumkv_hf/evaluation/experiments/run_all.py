"""`spectrumkv eval all`: every table and figure with one command, and one page that shows them."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrumkv_hf.evaluation.experiments import EXPERIMENTS
from spectrumkv_hf.evaluation.experiments.experiment import Experiment, Reduced, Run, model_label
from spectrumkv_hf.evaluation.report.figures import save
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, markdown_table, print_table
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.evaluation.subjects.text import PASSAGE, add_text_arguments
from spectrumkv_hf.support.whole_file import write_whole

NAME = "all"
TITLE = "every experiment; tables.md shows what came out"
SHARED = ("model", "dtype", "device", "attn_implementation", "load_in", "output")
TEXT = ("text_file", "dataset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all experiments share, and which of them to run."""
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results, figures, tables.md")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="EXPERIMENT")
    parser.add_argument("--batch", type=int, help="rows at once, of needles and generation")
    parser.add_argument(
        "--reduced", action=Reduced, nargs=0, default=False, grid={"dataset": PASSAGE}, help="the grids that CI runs"
    )


def arguments_of(experiment: Experiment, args: argparse.Namespace) -> argparse.Namespace:
    """An experiment's arguments: its own defaults, or the reduced ones, with what `args` says for all."""
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    experiment.configure(parser)
    own = parser.parse_args(["--reduced"] if args.reduced else [])
    shared: Mapping[str, Any] = vars(args)
    for key in (*SHARED, *(TEXT if experiment.reads_text else ())):
        setattr(own, key, shared[key])
    if args.batch is not None and hasattr(own, "batch"):
        own.batch = args.batch
    return own


def run(args: argparse.Namespace) -> None:
    """Run the experiments over one model, loaded once. One that the model can't have is reported, and skipped.

    Raises:
        ValueError, OSError, ImportError: bad arguments, of any of them, before the model is loaded.
    """
    chosen = [EXPERIMENTS[name] for name in dict.fromkeys(args.only)]
    prepared = []
    for experiment in chosen:
        own = arguments_of(experiment, args)
        prepared.append((experiment, own, experiment.prepare(own)))
    model, tokenizer = load_from(args)
    page = [f"# {model_label(args.model)}\n"]
    for experiment, own, text in prepared:
        part = [f"\n## {experiment.name}: {experiment.title}\n", f"\n{experiment.about}\n" if experiment.about else ""]
        try:
            measured = experiment.open(own, text, model, tokenizer)
            if len(page) == 1:
                page.append(f"\n{', '.join(f'{k} {v}' for k, v in measured.results.environment.items())}\n")
                print(page[-1])
            part += measure(experiment, measured)
        except (ImportError, OSError, ValueError) as problem:
            print(f"{experiment.name}: {problem}", file=sys.stderr)
            part.append(f"\nNot measured: {problem}\n")
        page.append("".join(part))
        write_whole(args.output / "tables.md", "".join(page))


def measure(experiment: Experiment, run: Run) -> list[str]:
    """Measure what is missing, print the table, write it and the figure beside the cells.

    Returns:
        Pieces of Markdown that show them.
    """
    experiment.measure(run)
    table = experiment.table(run)
    print(f"\n{experiment.title}")
    print_table(table.header, table.rows)
    run.results.table = {"header": table.header, "rows": table.rows}
    run.results.metrics = experiment.metrics(run)
    run.results.save()
    pieces = [f"\n{markdown_table(table.header, table.rows)}"]
    output = run.args.output
    if output is not None and (figure := experiment.figure(run)) is not None:
        save(figure, output / f"{experiment.name}.png")
        pieces.append(f"\n![{experiment.title}]({experiment.name}.png)\n")
    return pieces
