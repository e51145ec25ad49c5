"""What every experiment has: a name, arguments, cells that are measured once, a table and a figure."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.environment import environment
from spectrumkv_hf.evaluation.report.results import Cell, Results
from spectrumkv_hf.evaluation.subjects.methods import Method, parse_method
from spectrumkv_hf.evaluation.subjects.models import RANDOM, add_model_arguments
from spectrumkv_hf.evaluation.subjects.text import add_text_arguments, text_from, text_label, text_windows
from spectrumkv_hf.support.extras import required

SPEC = "NAME[:BUDGET[:CODEC[:IMPORTANCE[:SCOPE]]]][:OPTION=VALUE]"
T = TypeVar("T")


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Run:
    """What an experiment works on.

    Attributes:
        args: Of the experiment.
        model: In eval mode.
        tokenizer: Its tokenizer; None: a model with random weights, which only some experiments take.
        text: The held-out text; empty where the experiment reads none.
        results: Where cells are kept.
    """

    args: argparse.Namespace
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    text: str
    results: Results

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer, where there must be one."""
        if self.tokenizer is None:
            raise ValueError(f"model {self.args.model!r} has random weights and no tokenizer")
        return self.tokenizer

    @cached_property
    def methods(self) -> list[Method]:
        """Those that the arguments name; what this model can't have is reported before anything is measured."""
        methods = methods_from(self.args)
        for method in methods:
            method.prepare(self.model, self.tokenizer)
            method.cache(self.model)
        return methods

    def windows(self, length: int) -> list[torch.Tensor]:
        """`args.windows` windows of the text, `[1, length]` each, on the model's device."""
        return [ids.to(self.model.device) for ids in text_windows(self.words, self.text, length, self.args.windows)]

    def bar(self, items: Iterable[T], total: int | None = None) -> Iterable[T]:
        """The items, under a progress bar."""
        return tqdm(items, desc=self.args.experiment, total=total, disable=None)

    def cell(self, *key: object, measure: Callable[[], Cell]) -> Cell:
        """A cell by the parts of its key, measured unless it was before."""
        return self.results.cell(join(key), measure)


def join(key: Iterable[object]) -> str:
    """Key of a cell."""
    return " | ".join(map(str, key))


def methods_from(args: argparse.Namespace) -> list[Method]:
    """The methods that `args.methods` names, each once."""
    return [parse_method(spec, getattr(args, "recent_window", None)) for spec in dict.fromkeys(args.methods)]


class Experiment(ABC):
    """One question about compressed caches, and how it is measured.

    Attributes:
        name: On the command line, and of the files of results.
        title: A line that says what is measured.
        about: What of the paper it answers to, and how to read it.
        depends: Arguments that all cells depend on; results of other values are not mixed with them. What is part of
            a cell's key does not belong here.
        reduced: Arguments of a grid that two CPU cores measure in seconds.
        reads_text: Takes windows of a held-out text.
        random_weights: Means something on a model with random weights.
    """

    name: str
    title: str
    about: str
    depends: ClassVar[tuple[str, ...]] = ()
    reduced: Mapping[str, Any]
    reads_text: ClassVar[bool] = True
    random_weights: ClassVar[bool] = False

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Its own arguments."""

    @abstractmethod
    def check(self, args: argparse.Namespace) -> None:
        """Refuse bad arguments before a model is loaded.

        Raises:
            ValueError: there are some.
        """

    @abstractmethod
    def measure(self, run: Run) -> None:
        """Measure all cells that are missing."""

    @abstractmethod
    def table(self, run: Run) -> Table:
        """Summary of the cells that the arguments ask for."""

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        """What the modules of `spectrumkv_hf.evaluation.metrics` say of each row of the table, if they are used."""
        return []

    def figure(self, run: Run) -> "figures.Figure | None":
        """The same as a figure, where the paper has one."""
        return None

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """All arguments, those included that every experiment has."""
        add_model_arguments(parser)
        if self.reads_text:
            add_text_arguments(parser)
        parser.add_argument("--output", type=Path, metavar="DIR", help=f"{self.name}.json and .png go there")
        parser.add_argument(
            "--reduced", action=Reduced, nargs=0, default=False, grid=self.reduced, help="the grid that CI runs"
        )
        self.add_arguments(parser)
        parser.set_defaults(experiment=self.name)

    def prepare(self, args: argparse.Namespace) -> str:
        """Everything that can fail without a model; the text.

        Raises:
            ValueError, OSError, ImportError: what failed.
        """
        if args.model in RANDOM and not self.random_weights:
            raise ValueError(f"{self.name} needs a trained model, {args.model!r} has random weights")
        self.check(args)
        if args.output is not None and type(self).figure is not Experiment.figure:
            required("matplotlib.figure", "--output, which draws figures,")
        text = text_from(args) if self.reads_text else ""
        required("evaluate", "spectrumkv eval")
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
        return text

    def open(
        self,
        args: argparse.Namespace,
        text: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Run:
        """A run, with the cells that an earlier one left.

        Raises:
            ValueError: they were measured with other settings, or elsewhere.
        """
        settings = {"model": model_label(args.model), "load_in": args.load_in}
        settings |= {key: getattr(args, key) for key in self.depends}
        if self.reads_text:
            settings["text"] = text_label(args, text)
        path = args.output / f"{self.name}.json" if args.output else None
        return Run(args, model, tokenizer, text, Results(path, settings, environment(model)))


def model_label(name_or_path: str) -> str:
    """A model's name beside results: of a local path the last part only."""
    path = Path(name_or_path)
    return path.resolve().name if path.exists() else name_or_path


class Reduced(argparse.Action):
    """`--reduced`: sets the arguments of the grid that still have their defaults."""

    def __init__(self, *args: Any, grid: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grid = grid

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        for key, value in self.grid.items():
            if not hasattr(namespace, key):
                raise AttributeError(f"{self.grid} sets {key}, which is no argument")
            if getattr(namespace, key) == parser.get_default(key):
                setattr(namespace, key, value)
