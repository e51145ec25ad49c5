"""Figures in the paper's form, of `matplotlib` figures that share no state."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from spectrumkv_hf.evaluation.protocols.quality import Summary
from spectrumkv_hf.evaluation.subjects.methods import family_of
from spectrumkv_hf.support.extras import required

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Draw = Callable[[str, "list[Summary]"], "Figure"]
MARKERS = "osD^vP*X<>h"


def new_figure(title: str, columns: int = 1, width: float = 6.0, height: float = 4.5) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes in a row, `width` and `height` inches each.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure: Figure = required("matplotlib.figure", "a figure").Figure(
        figsize=(width * columns, height), layout="constrained"
    )
    figure.suptitle(title, wrap=True)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def lines(axes: "Axes", curves: dict[str, Iterable[tuple[float, float]]]) -> None:
    """Curves by name, each with its marker."""
    for index, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker=MARKERS[index % len(MARKERS)], markersize=4, linewidth=1.2, label=name)
    axes.grid(alpha=0.3)


def bars(title: str, summaries: "list[Summary]") -> "Figure":
    """KL and perplexity change of every method."""
    figure, axes = new_figure(title, 2, height=1.5 + 0.28 * len(summaries))
    contexts = len({summary.context for summary in summaries})
    names = [summary.spec if contexts == 1 else f"{summary.spec}, {summary.context}" for summary in summaries]
    axes[0].barh(names, [s.mean.kl for s in summaries], xerr=[s.kl_error or 0 for s in summaries])
    axes[0].set_xscale("log")
    axes[0].set_xlabel("KL to the exact cache, nats")
    axes[1].barh(names, [s.change for s in summaries], xerr=[s.change_error or 0 for s in summaries])
    axes[1].set_xscale("symlog", linthresh=1)
    axes[1].set_xlabel("perplexity change, %")
    axes[1].set_yticklabels([])
    for each in axes:
        each.invert_yaxis()
        each.grid(axis="x", alpha=0.3)
    return figure


def against_bytes(title: str, summaries: "list[Summary]") -> "Figure":
    """KL and perplexity change against the bytes that are really stored, a curve for each family."""
    return _curves(title, summaries, "stored bytes over FP16", lambda s: (family_of(s.spec), s.mean.actual_ratio))


def against_context(title: str, summaries: "list[Summary]") -> "Figure":
    """KL and perplexity change against the length of the context, a curve for each method."""
    figure = _curves(title, summaries, "tokens of context", lambda s: (s.spec, s.context))
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
    return figure


def _curves(
    title: str, summaries: "list[Summary]", label: str, place: "Callable[[Summary], tuple[str, float]]"
) -> "Figure":
    figure, axes = new_figure(title, 2)
    kl: dict[str, list[tuple[float, float]]] = {}
    change: dict[str, list[tuple[float, float]]] = {}
    for summary in summaries:
        name, x = place(summary)
        kl.setdefault(name, []).append((x, summary.mean.kl))
        change.setdefault(name, []).append((x, summary.change))
    for each, curves in zip(axes, (kl, change), strict=True):
        lines(each, {**curves})
        each.set_xlabel(label)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("KL to the exact cache, nats")
    axes[1].set_yscale("symlog", linthresh=1)
    axes[1].axhline(0, color="grey", linewidth=0.8)
    axes[1].set_ylabel("perplexity change, %")
    legend_below(figure, axes[0])
    return figure


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """One legend for all axes, that of `axes`."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")


def heat_map(
    axes: "Axes", values: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]
) -> "AxesImage":
    """Fractions from 0 to 1 as colours, `values[row][column]`; the image, for a colour bar."""
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    return image
