"""`spectrumkv eval`: experiments one by one, or all of them."""

import argparse

from spectrumkv_hf.evaluation.experiments import EXPERIMENTS, run_all
from spectrumkv_hf.evaluation.report.tables import HelpFormatter
from spectrumkv_hf.evaluation.subjects.models import load_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each experiment, and one for all."""
    chosen = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    whole = chosen.add_parser(
        run_all.NAME, help=run_all.TITLE, description=run_all.TITLE, formatter_class=HelpFormatter
    )
    run_all.add_arguments(whole)
    for name, experiment in EXPERIMENTS.items():
        about = f"{experiment.title}. {experiment.about}"
        own = chosen.add_parser(name, help=experiment.title, description=about, formatter_class=HelpFormatter)
        experiment.configure(own)


def run(args: argparse.Namespace) -> None:
    """Run what was chosen.

    Raises:
        ValueError, OSError, ImportError: problems that the user can mend.
    """
    if args.experiment == run_all.NAME:
        run_all.run(args)
        return
    experiment = EXPERIMENTS[args.experiment]
    text = experiment.prepare(args)
    measured = experiment.open(args, text, *load_from(args))
    print(", ".join(f"{key} {value}" for key, value in measured.results.environment.items()))
    run_all.measure(experiment, measured)
