"""`spectrumkv eval`: experiments, one by one or all that `paper` makes."""

import argparse

from spectrumkv_hf.evaluation.experiment import Experiment, Run
from spectrumkv_hf.evaluation.experiments import EXPERIMENTS
from spectrumkv_hf.evaluation.models import load_from
from spectrumkv_hf.evaluation.report import HelpFormatter, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each experiment."""
    chosen = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, experiment in EXPERIMENTS.items():
        own = chosen.add_parser(
            name, help=experiment.title, description=experiment.title, formatter_class=HelpFormatter
        )
        experiment.configure(own)


def run(args: argparse.Namespace) -> None:
    """Run what was chosen.

    Raises:
        ValueError, OSError, ImportError: problems that the user can mend.
    """
    experiment = EXPERIMENTS[args.experiment]
    text = experiment.prepare(args)
    measured = experiment.open(args, text, *load_from(args))
    print(", ".join(f"{key} {value}" for key, value in measured.results.environment.items()))
    measure(experiment, measured)


def measure(experiment: Experiment, run: Run) -> None:
    """Measure what is missing, print the table, and write it and the figure beside the cells."""
    experiment.measure(run)
    table = experiment.table(run)
    print(f"\n{experiment.title}")
    print_table(table.header, table.rows)
    run.results.table = {"header": table.header, "rows": table.rows}
    run.results.write()
    if run.args.output is not None and (figure := experiment.figure(run)) is not None:
        figure.savefig(run.args.output / f"{experiment.name}.png", dpi=150)
