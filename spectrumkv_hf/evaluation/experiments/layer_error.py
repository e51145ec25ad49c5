"""How far stored keys and values lie from the exact ones, layer by layer."""

import argparse
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.experiments.experiment import SPEC, Experiment, Run, Table, join, methods_from
from spectrumkv_hf.evaluation.protocols.quality import prefill
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.subjects.methods import Exact, Method
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.tiered.layer import SpectrumLayer

SIDES = ("keys", "values")


def vector_errors(stored: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Error of vectors `[..., channels]`.

    Returns:
        `relative_l2` and `cosine`, means over the vectors, and `max_abs`, over all channels.
    """
    stored, exact = stored.float(), exact.float()
    error = stored - exact
    relative = error.norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-12)
    return {
        "relative_l2": float(relative.mean()),
        "cosine": float(cosine_similarity(stored, exact, dim=-1).mean()),
        "max_abs": float(error.abs().max()),
    }


def layer_errors(cache: SpectrumCache, exact: Cache) -> list[dict[str, Any]]:
    """`vector_errors` of keys and of values for every tiered layer, with its index, of caches of the same tokens."""
    errors = []
    for index, (layer, true) in enumerate(zip(cache.layers, exact.layers, strict=True)):
        if not isinstance(layer, SpectrumLayer):
            continue
        own: dict[str, Any] = {"layer": index}
        for side in SIDES:
            own[side] = vector_errors(getattr(layer, side), getattr(true, side))
        errors.append(own)
    return errors


class ReconstructionError(Experiment):
    """A cell is a method on one window."""

    name = "layer-error"
    title = "Error of stored keys and values by layer"
    about = (
        "The paper's quantisation-error table and per-layer figures: mean over tokens and KV heads, after RoPE. The "
        "largest absolute error shows the outliers that cosine hides."
    )
    depends = ("tokens",)
    reduced: Mapping[str, Any] = {"dataset": "passage", "tokens": 256, "windows": 1}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            nargs="+",
            default=["uniform_int8", "uniform_int4", "uniform_int8::absmax", "uniform_int4::absmax"],
            metavar=SPEC,
            help="policies of the library",
        )
        parser.add_argument("--tokens", type=int, default=2048, help="prefilled")
        parser.add_argument("--windows", type=int, default=2, help="non-overlapping windows of the text")
        parser.set_defaults(recent_window=0)

    def check(self, args: argparse.Namespace) -> None:
        if args.tokens < 65 or args.windows < 1:
            raise ValueError("--tokens is 65 or more, so that tokens are tiered, and --windows 1 or more")
        for method in methods_from(args):
            if not hasattr(method, "policy"):
                raise ValueError(f"layer-error compares policies, {method.spec!r} is none")

    def measure(self, run: Run) -> None:
        windows = run.windows(run.args.tokens)

        @lru_cache(maxsize=1)  # the methods of a window take turns
        def exact(index: int) -> Cache:
            cache = Exact("exact").cache(run.model)
            prefill(run.model, windows[index], cache)
            return cache

        jobs = [(index, method) for index in range(len(windows)) for method in run.methods]
        for index, method in run.bar(jobs):
            measure = partial(self._cell, run, windows[index], method, partial(exact, index))
            run.cell(index, method.spec, measure=measure)

    def _cell(self, run: Run, ids: torch.Tensor, method: Method, exact: Callable[[], Cache]) -> Cell:
        cache = method.cache(run.model)
        prefill(run.model, ids, cache)
        if not isinstance(cache, SpectrumCache):
            raise ValueError(f"{method.spec!r} is no SpectrumCache")
        if not (errors := layer_errors(cache, exact())):
            raise ValueError(f"no layer of {run.args.model} is tiered:\n{cache.summary()}")
        return {"layers": errors}

    def _means(self, run: Run, spec: str) -> list[dict[str, Any]]:
        """The layers of a method, each the mean over the windows."""
        windows = [run.results.cells[join((i, spec))]["layers"] for i in range(run.args.windows)]
        return [
            {"layer": same[0]["layer"]}
            | {side: {key: fmean(each[side][key] for each in same) for key in same[0][side]} for side in SIDES}
            for same in zip(*windows, strict=True)
        ]

    def table(self, run: Run) -> Table:
        rows = []
        for spec in run.args.methods:
            layers = self._means(run, spec)
            row = [spec]
            for key, form in (("cosine", ".5f"), ("relative_l2", ".4f")):
                row += [format(fmean(layer[side][key] for layer in layers), form) for side in SIDES]
            worst = max(layers, key=lambda layer: layer["keys"]["max_abs"])
            rows.append([*row, f"{worst['keys']['max_abs']:.3f}", str(worst["layer"])])
        header = ["method", "cosine K", "cosine V", "rel. L2 K", "rel. L2 V", "max abs K", "in layer"]
        return Table(header, rows)

    def figure(self, run: Run) -> "figures.Figure":
        figure, axes = figures.new_figure(self.title, 2, 2, width=5, height=3)
        panels = (("keys", "relative_l2"), ("values", "relative_l2"), ("keys", "cosine"), ("keys", "max_abs"))
        for each, (side, key) in zip(axes, panels, strict=True):
            each.set_title(f"{side}: {key.replace('_', ' ')}", fontsize="medium")
            means = {spec: self._means(run, spec) for spec in run.args.methods}
            figures.lines(each, {spec: [(x["layer"], x[side][key]) for x in means[spec]] for spec in means})
            each.set_xlabel("layer")
            if key != "cosine":
                figures.log_scale(each, "y")
        figures.legend_below(figure, axes[0])
        return figure
