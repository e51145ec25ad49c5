"""Where the time to first token goes when a cache is compressed, sent and decoded, on one machine."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.experiments.experiment import SPEC, Experiment, Run, Table, join, methods_from
from spectrumkv_hf.evaluation.metrics import load
from spectrumkv_hf.evaluation.protocols.quality import prefill
from spectrumkv_hf.evaluation.report import figures
from spectrumkv_hf.evaluation.report.results import Cell
from spectrumkv_hf.evaluation.subjects.methods import Exact, Method, Tiered
from spectrumkv_hf.probe.divergence import logits_over
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.transfer.break_even import TransferCosts

T = TypeVar("T")
STAGES = ("prefill", "serialize", "deserialize", "decode")
GIGABIT = 1e9 / 8


def timed(device: torch.device, function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes until the device is done, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


@torch.inference_mode()
def stages(model: PreTrainedModel, ids: torch.Tensor, method: Method) -> dict[str, float]:
    """Seconds of prefill, which compresses, of serialising, deserialising and the first decode step, and bytes.

    A stock cache is decoded from where it lies: its bytes travel as they are.

    Args:
        model: In eval mode.
        ids: `[1, tokens]`; the last of them is the decode step's.
        method: `exact` or a `Tiered`.
    """
    context = ids.shape[1] - 1
    cache = method.cache(model)
    times = dict.fromkeys(STAGES, 0.0)
    times["prefill"], _ = timed(model.device, partial(prefill, model, ids[:, :context], cache))
    sent = method.memory(cache).stored
    received: Cache = cache
    if isinstance(cache, SpectrumCache):
        times["serialize"], buffer = timed(model.device, cache.serialize)
        sent = buffer.numel()
        read = partial(SpectrumCache.deserialize, buffer, model.config)
        times["deserialize"], received = timed(model.device, read)
    times["decode"], _ = timed(model.device, partial(logits_over, model, ids[:, context:], received, context))
    return {**times, "bytes": sent}


class Ttft(Experiment):
    """A cell is a method at one context: medians over the repeats."""

    name = "ttft"
    title = "Time to first token by stage"
    about = (
        "The paper's table timed a prefill of half of the prompt. Here prefill, compression, (de)serialisation and the "
        "first decode step are measured in one process, and the transfer is **computed** from bytes and bandwidth "
        "(`spectrumkv_hf.transfer.break_even`); examples/limited_link.py measures a real link."
    )
    depends = ("repeats",)
    reduced: Mapping[str, Any] = {"contexts": [256], "methods": ["sink_protect:0.3"], "repeats": 1}
    reads_text = False
    random_weights = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            nargs="+",
            default=["fp16", "sink_protect:0.5", "sink_protect:0.3", "drop_scored:0.5"],
            metavar=SPEC,
            help="policies of the library, beside exact",
        )
        parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096, 7168], help="tokens prefilled")
        parser.add_argument("--repeats", type=int, default=5, help="after one to warm up")
        parser.add_argument(
            "--links", nargs="+", type=float, default=[1.0, 10.0, 100.0], metavar="GBITS", help="Gbit/s, computed"
        )

    def check(self, args: argparse.Namespace) -> None:
        if min(args.contexts) < 65 or args.repeats < 1 or min(args.links) <= 0:
            raise ValueError("--contexts are 65 or more, --repeats 1 or more, --links positive")
        args.methods = list(dict.fromkeys(["exact", *args.methods]))
        if other := [m.spec for m in methods_from(args) if not isinstance(m, Exact | Tiered)]:
            raise ValueError(f"ttft sends caches of the library's policies, not {', '.join(other)}")

    def measure(self, run: Run) -> None:
        jobs = [(context, method) for context in run.args.contexts for method in run.methods]
        for context, method in run.bar(jobs):
            run.cell(context, method.spec, measure=partial(self._cell, run, context, method))

    def _cell(self, run: Run, context: int, method: Method) -> Cell:
        if run.tokenizer is None:
            ids = torch.randint(run.model.config.vocab_size, (1, context + 1))
        else:
            once = run.tokenizer(passage(), return_tensors="pt", verbose=False).input_ids
            ids = once.repeat(1, -(-(context + 1) // once.shape[1]))[:, : context + 1]
        ids = ids.to(run.model.device)
        rounds = [stages(run.model, ids, method) for _ in range(1 + run.args.repeats)][1:]
        medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        return {**medians, "layers": len(method.cache(run.model).layers)}

    def seconds(self, run: Run, context: int, spec: str, gigabits: float, streamed: bool = False) -> float:
        """To the first token that is decoded over what came through a link, its time computed."""
        cell = run.results.cells[join((context, spec))]
        whole = self.costs(run, context, spec).seconds(gigabits * GIGABIT, spec != "exact", streamed)
        return float(whole + cell["deserialize"] + cell["decode"])

    def costs(self, run: Run, context: int, spec: str) -> TransferCosts:
        """What `break_even` computes with; compression is what prefill and serialising take beyond exact."""
        exact, cell = (run.results.cells[join((context, name))] for name in ("exact", spec))
        return TransferCosts(
            fp16_bytes=exact["bytes"],
            ratio=self.memory(run, context, spec)["ratio"],
            prefill=exact["prefill"],
            compress=self.compress(run, context, spec) + cell["serialize"],
            layers=cell["layers"],
        )

    def memory(self, run: Run, context: int, spec: str) -> dict[str, Any]:
        """`kv_memory` of what a method sends, beside the exact cache."""
        exact, cell = (run.results.cells[join((context, name))] for name in ("exact", spec))
        measurement = load("kv_memory", keep_in_memory=True)
        memory: dict[str, Any] = measurement.compute(stored=[cell["bytes"]], exact=[exact["bytes"]])
        return memory

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        return [
            {"method": spec, "context": context, "kv_memory": self.memory(run, context, spec)}
            for context in run.args.contexts
            for spec in run.args.methods
        ]

    def compress(self, run: Run, context: int, spec: str) -> float:
        """Seconds by which a method's prefill is longer than the exact one."""
        exact, cell = (run.results.cells[join((context, name))] for name in ("exact", spec))
        return float(max(cell["prefill"] - exact["prefill"], 0))

    def table(self, run: Run) -> Table:
        rows = []
        for context in run.args.contexts:
            for spec in run.args.methods:
                cell = run.results.cells[join((context, spec))]
                row = [spec, str(context), *(f"{1e3 * cell[stage]:.1f}" for stage in STAGES)]
                row.insert(3, f"{1e3 * self.compress(run, context, spec):.1f}")
                row.append(f"{cell['bytes'] / 2**20:.1f}")
                for link in run.args.links:
                    row += [f"{1e3 * self.seconds(run, context, spec, link, way):.0f}" for way in (False, True)]
                faster = self.costs(run, context, spec).break_even(streamed=False) / GIGABIT
                rows.append([*row, "" if spec == "exact" else f"{faster:.1f}"])
        links = [f"{link:g} Gbit/s {way}" for link in run.args.links for way in ("whole", "streamed")]
        names = ["prefill", "of it compress", *STAGES[1:]]
        header = ["method", "context", *(f"{name} ms" for name in names), "MiB", *links, "pays below Gbit/s"]
        return Table(header, rows)

    def figure(self, run: Run) -> "figures.Figure":
        contexts, specs, link = run.args.contexts, run.args.methods, min(run.args.links)
        title = f"{self.title}; transfer computed for {link:g} Gbit/s, sent whole"
        figure, axes = figures.new_figure(title, len(contexts), width=4.2, height=3)
        for each, context in zip(axes, contexts, strict=True):
            cells = [run.results.cells[join((context, spec))] for spec in specs]
            transfer = [cell["bytes"] / (link * GIGABIT) for cell in cells]
            compress = [self.compress(run, context, spec) for spec in specs]
            parts = {
                "prefill": [cell["prefill"] - more for cell, more in zip(cells, compress, strict=True)],
                "compress": compress,
                "serialize": [cell["serialize"] for cell in cells],
            }
            parts |= {"transfer (computed)": transfer} | {s: [cell[s] for cell in cells] for s in STAGES[2:]}
            shades, left = figures.colours(parts), [0.0] * len(specs)
            for part, values in parts.items():
                widths = [1e3 * value for value in values]
                each.barh(specs, widths, left=left, label=part, color=shades[part])
                left = [start + width for start, width in zip(left, widths, strict=True)]
            each.set_title(f"{context} tokens", fontsize="medium")
            each.set_xlabel("ms")
            each.invert_yaxis()
            each.tick_params(labelleft=each is axes[0])
        figures.legend_below(figure, axes[0])
        return figure
