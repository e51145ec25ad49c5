"""Figures in the paper's form, of `matplotlib` figures that share no state.

The cache that this package makes has one strong colour in all of them, and other methods have colours of their own.
"""

import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectrumkv_hf.evaluation.protocols.quality import Summary
from spectrumkv_hf.evaluation.subjects.methods import family_of
from spectrumkv_hf.policy import POLICIES
from spectrumkv_hf.support.extras import required
from spectrumkv_hf.support.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[str, list[Summary]], "Figure"]
Curves = Mapping[str, Sequence[tuple[float, float]]]
MARKERS = "osD^vP*X<>h"

OURS = "#c8102e"
PEERS = {
    "paper_greedy": "#1f5fbf", "snapkv": "#2e8b2e", "paper_sink_protect": "#6a3d9a", "drop_scored": "#c49a3a",
    "paper_balanced": "#00a2c7", "drop_window": "#6b4423", "paper_two_tier": "#b565a7", "fp8": "#5a5a5a",
    "quanto": "#ff7f0e", "nf4": "#00574b", "expected_attention": "#93c13d", "paper_uniform_int8": "#0b2a5b",
    "fp8_e4m3": "#f47fd0", "fp4": "#47b5a0", "hqq": "#f2c200", "paper_random": "#8a94a6", "fp8_e5m2": "#9c2a86",
    "paper_uniform_int4": "#7f9bd1", "kivi": "#6e7a00", "turboquant": "#c3a6ff",
}  # fmt: skip
"""Of methods that are not this package's; what has no name here takes from those that are free, in this order."""


def _peer(name: str) -> str:
    """Of a spec, what tells other people's methods apart; empty for this package's own cache."""
    first, *fields = name.replace("paper_drop_", "drop_").split(":")
    if "absmax" in fields:
        return f"paper_{first}"
    ours = first in POLICIES and not first.startswith("drop_") or first.startswith("SpectrumKV")
    return "" if ours else first


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, none of them twice.

    Specs of this package's codec and tiers have `OURS`, the default policy in full strength and others in tints of it.
    Several specs of one peer have tints of its colour.
    """
    names = sorted(dict.fromkeys(names), key=lambda name: not name.startswith("sink_protect"))
    bases = {"": OURS, **PEERS}
    peers = dict.fromkeys(map(_peer, names))
    spare = [colour for peer, colour in PEERS.items() if peer not in peers] or list(PEERS.values())
    for index, peer in enumerate(peer for peer in peers if peer not in bases):
        bases[peer] = spare[index % len(spare)]
    found: dict[str, str] = {}
    for base in dict.fromkeys(bases.values()):
        same = [name for name in names if bases[_peer(name)] == base]
        found |= {name: _tint(base, 0.7 * index / len(same)) for index, name in enumerate(same)}
    return found


def _tint(colour: str, white: float) -> str:
    """`#rrggbb` with a share of white, 0 to 1."""
    return "#" + "".join(f"{round(int(colour[i : i + 2], 16) * (1 - white) + 255 * white):02x}" for i in range(1, 7, 2))


def new_figure(
    title: str, columns: int = 1, rows: int = 1, width: float = 6.0, height: float = 4.5
) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, row by row, `width` and `height` inches each.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure: Figure = required("matplotlib.figure", "a figure").Figure(
        figsize=(width * columns, height * rows), layout="constrained"
    )
    figure.suptitle(title, wrap=True)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the path's suffix; a PNG with a palette, at a third of the size.

    Raises:
        OSError, ValueError: it can't be written, or not in that format.
    """
    drawn, kind = io.BytesIO(), path.suffix[1:] or "png"
    figure.savefig(drawn, dpi=110, format=kind)
    with whole_file(path) as file:
        if kind == "png":
            from PIL import Image  # which matplotlib brings

            image = Image.open(drawn).convert("RGB")
            image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
                file, format="png", optimize=True
            )
        else:
            file.write(drawn.getvalue())


def lines(axes: "Axes", curves: Curves) -> None:
    """Curves by name, each with its colour and marker, ours on top and strong."""
    shades = colours(curves)
    for index, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        strong = shades[name] == OURS
        axes.plot(
            x, y, marker=MARKERS[index % len(MARKERS)], markersize=6 if strong else 4, linewidth=2.4 if strong else 1.2,
            color=shades[name], zorder=4 if strong else 3, label=name,
        )  # fmt: skip
    if all(isinstance(x, int) for points in curves.values() for x, _ in points):
        axes.xaxis.set_major_locator(required("matplotlib.ticker", "a figure").MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def label_ends(axes: "Axes", curves: Curves) -> list[str]:
    """Names of curves to the right of where they end, in their colours; scales and limits are set before.

    Returns:
        Names of points, and of curves that end too far from the right, which a legend has to tell.
    """
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    last = {name: max(points) for name, points in curves.items()}
    ends = {name: to_axes.transform(point) for name, point in last.items()}
    named = [name for name, points in curves.items() if len(points) > 1 and ends[name][0] > 0.75]
    named.sort(key=lambda name: float(ends[name][1]))
    gap = 13 * axes.figure.dpi / 72 / axes.get_window_extent().height  # a line of small text
    places = [float(ends[name][1]) for name in named]
    for _ in range(200):
        for low in range(len(places) - 1):
            overlap = max(places[low] + gap - places[low + 1], 0)
            places[low], places[low + 1] = places[low] - overlap / 2, places[low + 1] + overlap / 2
    shades = colours(curves)
    for name, place in zip(named, places, strict=True):
        axes.annotate(
            name, last[name], (1.05, place), textcoords="axes fraction", color=shades[name], va="center",
            fontsize="small", fontweight="bold" if shades[name] == OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": shades[name], "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    return [name for name in curves if name not in named]


def legend_below(figure: "Figure", axes: "Axes", only: Collection[str] | None = None) -> None:
    """One legend for all axes, that of `axes`, outside of them; `only`: the names in it; None: all."""
    entries = [each for each in zip(*axes.get_legend_handles_labels(), strict=True) if only is None or each[1] in only]
    if entries:
        figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=6, fontsize="small")


def dots(title: str, summaries: list[Summary]) -> "Figure":
    """KL and perplexity change of every method, with standard errors."""
    figure, axes = new_figure(title, 2, width=5.0, height=1.3 + 0.24 * len(summaries))
    contexts = len({summary.context for summary in summaries})
    for row, s in enumerate(summaries):
        colour = next(iter(colours([s.spec]).values()))
        for each, value, error in ((axes[0], s.mean.kl, s.kl_error), (axes[1], s.change, s.change_error)):
            each.errorbar(value, row, xerr=error or 0, fmt="o", color=colour, markersize=7 if colour == OURS else 5)
    names = [s.spec if contexts == 1 else f"{s.spec}, {s.context}" for s in summaries]
    axes[0].set_yticks(range(len(names)), names)
    axes[1].set_yticks(range(len(names)), [""] * len(names))
    if max(s.mean.kl for s in summaries) > 5 * min(s.mean.kl for s in summaries) > 0:
        log_scale(axes[0], "x")
    axes[0].set_xlabel("KL to the exact cache, nats")
    if max(abs(s.change) for s in summaries) > 3:
        axes[1].set_xscale("symlog", linthresh=1)
        axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].axvline(0, color="grey", linewidth=0.8)
    axes[1].set_xlabel("perplexity change, %")
    for each in axes:
        each.invert_yaxis()
        each.grid(alpha=0.3)
    return figure


def log_scale(axes: "Axes", side: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    (axes.set_xscale if side == "x" else axes.set_yscale)("log")
    axis.set_major_locator(required("matplotlib.ticker", "a figure").LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def against_bytes(title: str, summaries: list[Summary]) -> "Figure":
    """KL and perplexity change against the bytes that are really stored, a curve for each family."""
    return _curves(title, summaries, "stored bytes over FP16", lambda s: (family_of(s.spec), s.mean.actual_ratio))


def against_context(title: str, summaries: list[Summary]) -> "Figure":
    """KL and perplexity change against the length of the context, a curve for each method."""
    return _curves(title, summaries, "tokens of context", lambda s: (s.spec, s.context), log=True)


def _curves(
    title: str, summaries: list[Summary], label: str, place: Callable[[Summary], tuple[str, float]], log: bool = False
) -> "Figure":
    figure, axes = new_figure(title, 2)
    kl: dict[str, list[tuple[float, float]]] = {}
    change: dict[str, list[tuple[float, float]]] = {}
    for summary in summaries:
        name, x = place(summary)
        kl.setdefault(name, []).append((x, summary.mean.kl))
        change.setdefault(name, []).append((x, summary.change))
    for each, curves in zip(axes, (kl, change), strict=True):
        lines(each, curves)
        each.set_xlabel(label)
        if log:
            each.set_xscale("log", base=2)
            each.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
            each.xaxis.set_major_formatter("{x:g}")
    log_scale(axes[0], "y")
    axes[0].set_ylabel("KL to the exact cache, nats")
    change_scale(axes[1])
    unnamed = [name for each, curves in zip(axes, (kl, change), strict=True) for name in label_ends(each, curves)]
    legend_below(figure, axes[0], unnamed)
    return figure


def change_scale(axes: "Axes") -> None:
    """A vertical axis of perplexity changes, linear between -1 and 1 %."""
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("perplexity change, %")
