"""How figures look: whose colour is whose, where legends stand, and that stored results can be drawn again."""

import colorsys
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import bench_kernels
import redraw_figures
from matplotlib.text import Text
from PIL import Image

from spectrumkv_hf.evaluation.experiments import EXPERIMENTS
from spectrumkv_hf.evaluation.experiments.experiment import Experiment
from spectrumkv_hf.evaluation.report.figures import OURS, colours, label_ends, lines, new_figure, save
from spectrumkv_hf.evaluation.subjects.methods import BASELINES, family_of
from spectrumkv_hf.policy import POLICIES

RESULTS = Path(__file__).parents[2] / "results"
STORED = sorted(path for path in RESULTS.glob("evaluation/*/*.json") if redraw_figures.experiment_of(path))


def drawn(path):
    experiment = redraw_figures.experiment_of(path)
    figure = experiment.figure(redraw_figures.stored(experiment, path))
    figure.draw_without_rendering()
    return figure


def red(colour):
    hue, _, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    return saturation > 0.2 and (hue > 0.93 or hue < 0.03)


def test_no_colour_is_there_twice():
    """Of everything that has a name, at several budgets, and of names that nobody knows."""
    policies = [name for name in POLICIES if not name.startswith("drop_")]
    names = [*BASELINES, *POLICIES, *(f"paper_{name}" for name in policies), "uniform_int8::absmax"]
    names += [f"{name}:{budget}" for name in names for budget in (0.3, 0.5)] + [f"stage {i}" for i in range(12)]
    assert len({*colours(names).values()}) == len({*names})


def test_ours_is_strong_and_nobody_else_is_red():
    budget_sweep = ["uniform_int8", "balanced", "sink_protect", "paper_greedy", "paper_sink_protect", *BASELINES]
    got = colours([*budget_sweep, "drop_window", "drop_scored", "sink_protect::absmax"])
    assert got["sink_protect"] == OURS
    assert {name for name, colour in got.items() if red(colour)} == {"uniform_int8", "balanced", "sink_protect"}
    assert colours(["SpectrumKV b=.5", "QuantizedCache"])["SpectrumKV b=.5"] == OURS
    alone = {name: colours([name])[name] for name in ("paper_greedy", "snapkv", "nf4", "hqq")}
    assert alone == {name: colours([*budget_sweep, name])[name] for name in alone}  # the same in every figure


def test_names_stand_where_curves_end_and_never_on_each_other():
    figure, [axes] = new_figure("")
    curves = {f"curve {i}": [(0, i), (1, 5 + i / 1000)] for i in range(7)} | {
        "short": [(0, 1), (0.2, 3)],
        "dot": [(1, 1)],
    }
    lines(axes, curves)
    assert label_ends(axes, curves) == ["short", "dot"]
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)  # without the line
    assert len(boxes) == 7 and min(box.x0 for box in boxes) > axes.get_window_extent().x1
    gaps = [above.y0 - below.y0 for below, above in zip(boxes, boxes[1:], strict=False)]
    assert min(gaps) >= 0.95 * max(box.height for box in boxes)


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_stored_figures(path):
    """No legend covers data, nothing is wider than a page can show, and all that was measured for all is there."""
    figure = drawn(path)
    width, height = figure.get_size_inches()
    assert width <= 13 and width / height < 4.7
    assert not [axes for axes in figure.axes if axes.get_legend()]
    for legend in figure.legends:
        assert not [axes for axes in figure.axes if axes.get_window_extent().overlaps(legend.get_window_extent())]
    for axes in figure.axes:
        shades = [line.get_color() for line in axes.get_lines() if re.match("[a-z]", line.get_label())]
        assert len({*shades}) == len(shades)
    held = json.loads(path.read_text())
    if path.stem in ("budget-sweep", "needles-before", "needles-after"):
        families = {family_of(key.split(" | ")[-1 if path.stem == "budget-sweep" else 0]) for key in held["cells"]}
        assert families == {line.get_label() for line in figure.axes[0].get_lines()}


def test_kernels(tmp_path):
    """What attends is compared, and what compresses is not a speedup over attention."""
    rows = json.loads((RESULTS / "kernels-h100.json").read_text())["rows"]
    assert any(row["method"].startswith("compress") for row in rows)
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_kernels, "save", lambda figure, path: figures.append(figure))
        bench_kernels.plot(rows, tmp_path / "x.png")
    names = {line.get_label() for axes in figures[0].axes for line in axes.get_lines() if line.get_label()[0] != "_"}
    assert names == {row["method"] for row in rows if not row["method"].startswith(("SDPA", "compress"))}


def test_pictures_are_small_and_keep_their_colours(tmp_path):
    path = tmp_path / "x.png"
    figure, [axes] = new_figure("title")
    curves = {name: [(i, j) for i in range(9)] for j, name in enumerate(("sink_protect", "paper_greedy", "nf4", "hqq"))}
    lines(axes, curves)
    save(figure, path)
    with Image.open(path) as image:
        assert image.mode == "P"
        found = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    for colour in colours(curves).values():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert any(max(abs(a - b) for a, b in zip(wanted, color, strict=True)) <= 4 for color in found)
    save(figure, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    for stored in RESULTS.rglob("*.png"):
        assert stored.stat().st_size < 70_000, stored


def test_every_experiment_draws_what_is_stored():
    drawn = {name for name, each in EXPERIMENTS.items() if type(each).figure is not Experiment.figure}
    drawn -= {"perplexity", "uniform", "generation"}  # which no results are stored of
    assert {redraw_figures.experiment_of(path).name for path in STORED} >= drawn
