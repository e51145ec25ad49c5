"""Draw the figures of stored results again, without a model: after a change of how they look.

python examples/redraw_figures.py results/evaluation/*/*.json
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import mode
from typing import Any, cast

from spectrumkv_hf.evaluation.experiments import EXPERIMENTS
from spectrumkv_hf.evaluation.experiments.experiment import Experiment, Run
from spectrumkv_hf.evaluation.report.figures import save
from spectrumkv_hf.evaluation.report.results import Results

KEYS = {
    "needles": ("methods", "needles"),
    "generation": ("contexts", "methods"),
    "layer-error": ("windows", "methods"),
    "paper-perplexity": ("windows", "policies"),
    "access-skew": ("windows",),
    "ttft": ("contexts", "methods"),
}
"""Arguments that the parts of a cell's key are; of the other experiments context, window and method."""


def experiment_of(path: Path) -> Experiment | None:
    """The one whose name the file's begins with, as `needles-before.json`."""
    return next((each for name, each in EXPERIMENTS.items() if path.stem.startswith(name)), None)


def stored(experiment: Experiment, path: Path) -> Run:
    """A run that holds the cells of a file, with the arguments that ask for all of them that are complete."""
    held = json.loads(path.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser()
    experiment.configure(parser)
    args = parser.parse_args([], argparse.Namespace(**held["settings"]))
    keys = [key.split(" | ") for key in held["cells"]]
    for place, name in enumerate(KEYS.get(experiment.name, ("contexts", "windows", "methods"))):
        if name in ("windows", "needles"):
            others = Counter((*key[:place], *key[place + 1 :]) for key in keys)
            setattr(args, name, mode(others.values()))
            continue
        counts = Counter(key[place] for key in keys)
        found = [part for part, count in counts.items() if count >= mode(counts.values())]
        if name == "policies":
            found.remove("fp16")  # what the others are compared with
        setattr(args, name, [int(part) for part in found] if name == "contexts" else found)
    results = Results(path, held["settings"], held["environment"])
    return Run(args, cast(Any, None), None, "", results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="figures go beside them")
    return parser.parse_args()


def main() -> None:
    for path in parse_args().results:
        experiment = experiment_of(path)
        if experiment and (figure := experiment.figure(stored(experiment, path))) is not None:
            save(figure, path.with_suffix(".png"))
            print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
