"""Experiments and their command, on a tiny model."""

import json

import pytest
import tiny
import torch
from families import model, prompt
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.commands.main import main
from spectrumkv_hf.evaluation.experiments import EXPERIMENTS
from spectrumkv_hf.evaluation.experiments.experiment import Experiment
from spectrumkv_hf.evaluation.experiments.layer_error import layer_errors, vector_errors
from spectrumkv_hf.evaluation.experiments.ttft import stages
from spectrumkv_hf.evaluation.protocols.skew import attention_mass, gini
from spectrumkv_hf.evaluation.subjects import models
from spectrumkv_hf.evaluation.subjects.methods import parse_method

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_random", load)


@pytest.mark.parametrize(
    "values, want",
    [([1, 1, 1, 1], 0), ([0, 0, 0, 5], 0.75), ([1, 2, 3], 2 / 9), ([0, 0], 0), ([[2, 2], [0, 1]], [0, 0.5])],
)
def test_gini(values, want):
    torch.testing.assert_close(gini(torch.tensor(values)), torch.tensor(want, dtype=torch.float64))


def test_gini_of_an_exponential_is_a_half():
    quantiles = -torch.log1p(-(torch.arange(20000) + 0.5) / 20000)
    assert float(gini(quantiles)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_attention_mass(family):
    """That of the model's own probabilities, after which its attention is what it was."""
    built, ids = model(family), prompt(40)
    before = built.config._attn_implementation
    mass = attention_mass(built, ids)
    assert built.config._attn_implementation == before
    with torch.no_grad():
        weights = model(family, attention="eager")(ids, output_attentions=True).attentions
    assert len(mass) == len(weights) == 2
    for layer, probabilities in enumerate(weights):
        torch.testing.assert_close(mass[layer], probabilities[0].sum(-2))
        torch.testing.assert_close(mass[layer].sum(-1), torch.full((4,), 40.0))


def test_vector_errors():
    got = vector_errors(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert got == pytest.approx({"relative_l2": (4 / 3 + 1) / 2, "cosine": (0.6 + 1) / 2, "max_abs": 4})


@pytest.mark.parametrize("family, changes", [("llama", {}), ("gemma2", {"sliding_window": 160})])
def test_layer_errors(family, changes):
    """Against the stores' own contents; with a window, of the tokens in it."""
    built, ids = model(family, **changes), prompt(200)
    exact = DynamicCache(config=built.config)
    caches = {name: SpectrumCache(built.config, name, recent_window=0) for name in ("uniform_int8", "uniform_int4")}
    with torch.no_grad():
        for cache in (exact, *caches.values()):
            built(ids, **cache_argument(cache))
    errors = {name: layer_errors(cache, exact) for name, cache in caches.items()}
    for layer in (0, 1):
        keys = caches["uniform_int4"].layers[layer].keys
        want = exact.layers[layer].keys
        worst = (keys[:, :, -want.shape[2] :] - want).abs().max()
        assert errors["uniform_int4"][layer]["keys"]["max_abs"] == pytest.approx(float(worst))
        for side in ("keys", "values"):
            eight, four = (errors[name][layer][side]["relative_l2"] for name in caches)
            assert 0 < 8 * eight < four < 0.2


def test_stages_of_the_time_to_first_token():
    llama, ids = model("llama"), prompt(201)
    got = stages(llama, ids, parse_method("sink_protect:0.3", recent_window=0))
    assert min(got[stage] for stage in ("prefill", "serialize", "deserialize", "decode")) > 0
    exact = stages(llama, ids, parse_method("exact"))
    assert exact["bytes"] == 2 * 2 * 2 * 200 * 16 * 4  # layers, sides, heads, tokens, channels, float32
    assert got["bytes"] < exact["bytes"] / 2 and exact["serialize"] == 0


@pytest.mark.slow
def test_reduced_paper(folder, tmp_path, capsys):
    """Everything with one command; a second run measures nothing again."""
    main(["eval", "all", "--reduced", "--model", folder, "--output", str(tmp_path)])
    page = (tmp_path / "tables.md").read_text()
    assert "Not measured" not in page
    for name, experiment in EXPERIMENTS.items():
        held = json.loads((tmp_path / f"{name}.json").read_text())
        assert held["cells"] and held["table"]["rows"]
        assert held["environment"]["torch"] == torch.__version__ and held["environment"]["device"]
        assert str(tmp_path.parent) not in json.dumps(held)
        figure = tmp_path / f"{name}.png"
        if type(experiment).figure is Experiment.figure:
            assert not figure.exists()
        else:
            assert figure.read_bytes().startswith(b"\x89PNG")
        assert f"## {name}: {experiment.title}" in page
    first = json.loads((tmp_path / "ttft.json").read_text())["cells"]
    shown = capsys.readouterr().out
    main(["eval", "all", "--reduced", "--model", folder, "--output", str(tmp_path)])
    assert capsys.readouterr().out == shown
    assert json.loads((tmp_path / "ttft.json").read_text())["cells"] == first  # times never come out twice the same


def test_single_experiment_adds_methods(folder, tmp_path, capsys):
    common = ["eval", "perplexity", "--model", folder, "--dataset", "passage", "--contexts", "128"]
    common += ["--continuation", "16", "--windows", "2", "--output", str(tmp_path), "--methods"]
    main([*common, "sink_protect:0.5"])
    first = json.loads((tmp_path / "perplexity.json").read_text())["cells"]
    main([*common, "uniform_int4", "sink_protect:0.5"])
    second = json.loads((tmp_path / "perplexity.json").read_text())["cells"]
    assert set(second) - set(first) == {"128 | 0 | uniform_int4", "128 | 1 | uniform_int4"}
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[-3:]] == ["exact", "uniform_int4", "sink_protect:0.5"]


def test_results_of_another_grid_are_refused(folder, tmp_path, capsys):
    common = ["eval", "access-skew", "--model", folder, "--dataset", "passage", "--windows", "1"]
    main([*common, "--tokens", "60", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main([*common, "--tokens", "80", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "another settings (tokens)" in capsys.readouterr().err


def test_what_a_model_cannot_have_is_skipped(tmp_path, capsys):
    """A fused projection has no place for the paper's hooks; the other experiments go on."""
    fused = tiny.save(tmp_path / "phi", "phi3")
    only = ["--only", "paper-perplexity", "access-skew"]
    main(["eval", "all", "--reduced", "--model", fused, "--output", str(tmp_path / "out"), *only])
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "Not measured: the paper's protocol hooks modules named k_proj and v_proj" in page
    assert "| received: all that a token receives" in page


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["perplexity", "--methods", "sink_protect:0.1"], "serves budgets from 0.25 to 1"),
        (["perplexity", "--continuation", "1"], "--continuation is 2 or more"),
        (["perplexity", "--methods"], "no method is given"),
        (["perplexity", "--text-file", "nowhere.txt"], "nowhere.txt"),
        (["perplexity", "--model", "random-llama-3-8b"], "needs a trained model"),
        (["budget-sweep", "--families", "greedy:0.3"], "budget of its own"),
        (["paper-perplexity", "--policies", "exact"], "unknown method 'paper_exact'"),
        (["needles", "--depths", "1.5"], "--depths are fractions"),
        (["needles", "--needles", "9"], "--needles is 1 to 5"),
        (["needles", "--batch", "0"], "--batch"),
        (["layer-error", "--methods", "exact"], "compares policies, 'exact' is none"),
        (["access-skew", "--tokens", "3"], "--tokens is 20 or more"),
        (["ttft", "--links", "0"], "--links positive"),
    ],
)
def test_bad_arguments_are_refused_before_the_model(no_model, arguments, message, tmp_path, capsys):
    reads_text = EXPERIMENTS[arguments[0]].reads_text and "--text-file" not in arguments
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments, *(["--dataset", "passage"] if reads_text else []), "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_reduced_leaves_what_was_given(folder, tmp_path, capsys):
    main(["eval", "access-skew", "--tokens", "50", "--reduced", "--model", folder, "--output", str(tmp_path)])
    settings = json.loads((tmp_path / "access-skew.json").read_text())["settings"]
    assert settings["tokens"] == 50 and settings["text"].startswith("passage (sha256 ")
