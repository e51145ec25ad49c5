"""Quality of a continuation, methods by name, and results that resume."""

import json
import math

import pytest
import torch
from families import model, prompt
from transformers import DynamicCache

from spectrumkv_hf import cache_argument
from spectrumkv_hf.evaluation.experiments import needles
from spectrumkv_hf.evaluation.protocols.quality import Quality, continuation_quality, measure, summarise, with_error
from spectrumkv_hf.evaluation.report.results import Results
from spectrumkv_hf.evaluation.report.tables import markdown_table
from spectrumkv_hf.evaluation.subjects.methods import at_budgets, family_of, parse_method
from spectrumkv_hf.probe.divergence import mean_kl, mean_loss
from spectrumkv_kernels import DEFAULT_CODEC

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")


def test_numbers():
    """Against the definition, with the cache's own dequantised contents in a `DynamicCache`."""
    llama, ids, context = model("llama"), prompt(260), 200
    method = parse_method("sink_protect:0.3", recent_window=0)
    got = continuation_quality(llama, ids, context, method)

    with torch.no_grad():
        reference = llama(ids, use_cache=False).logits[0, context:].double().log_softmax(-1)
        stored = method.cache(llama)
        llama(ids[:, :context], **cache_argument(stored))
        dense = DynamicCache(config=llama.config)
        for index, layer in enumerate(stored.layers):
            dense.update(layer.keys.clone(), layer.values.clone(), index)
        other = llama(ids[:, context:], **cache_argument(dense)).logits[0].double().log_softmax(-1)
    rows, targets = torch.arange(59), ids[0, context + 1 :]
    kl = (reference.exp() * (reference - other)).sum(-1).mean()
    assert kl > 1e-4
    assert got.kl == pytest.approx(float(kl), rel=1e-3)
    assert got.exact_loss == pytest.approx(-float(reference[rows, targets].mean()), rel=1e-5)
    assert got.loss == pytest.approx(-float(other[rows, targets].mean()), rel=1e-4)
    assert got.actual_ratio == stored.memory().actual_ratio and got.nominal_ratio == stored.memory().nominal_ratio
    assert got.perplexity_change == pytest.approx(100 * (got.perplexity / got.exact_perplexity - 1))


def test_exact_method_loses_nothing():
    got = continuation_quality(model("qwen2"), prompt(120), 100, parse_method("exact"))
    assert got.kl == pytest.approx(0, abs=1e-10) and got.loss == pytest.approx(got.exact_loss, abs=1e-7)


def test_it_needs_a_context_and_a_continuation():
    for context in (0, 99, 100):
        with pytest.raises(ValueError, match="do not leave 2 or more"):
            continuation_quality(model("llama"), prompt(100), context, parse_method("exact"))


def test_kl_and_loss_against_torch():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(70, 50, generator=generator) * 3 for _ in range(2))
    ids = torch.randint(50, (70,), generator=generator)
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert mean_kl(p, q) == pytest.approx(float(kl), rel=1e-5)
    assert mean_kl(p, p) == 0
    assert mean_loss(p, ids) == pytest.approx(float(torch.nn.functional.cross_entropy(p[:-1], ids[1:])), rel=1e-5)


def test_measure_is_the_mean_of_the_windows():
    llama, windows = model("llama"), [prompt(150, seed=seed) for seed in (1, 2)]
    method = parse_method("uniform_int4", recent_window=0)
    single = [continuation_quality(llama, ids, 120, method) for ids in windows]
    assert measure(llama, windows, 120, [method])["uniform_int4"] == Quality.mean(single)


def test_summary_has_the_error_of_the_windows():
    windows = [Quality(kl, 2 + kl, 2.0, 0.4, 0.3) for kl in (0.1, 0.2, 0.6)]
    summary = summarise("x", 10, windows)
    deviation = math.sqrt(((0.1 - 0.3) ** 2 + (0.2 - 0.3) ** 2 + (0.6 - 0.3) ** 2) / 2)
    assert summary.mean.kl == pytest.approx(0.3) and summary.kl_error == pytest.approx(deviation / math.sqrt(3))
    assert summary.change == pytest.approx(100 * math.expm1(0.3))
    assert summary.change_error == pytest.approx(100 * math.exp(0.3) * deviation / math.sqrt(3))
    assert summarise("x", 10, windows[:1]).kl_error is None
    assert with_error([3.0]) == (3.0, None)
    assert with_error([3.0, math.inf]) == (math.inf, pytest.approx(math.nan, nan_ok=True))


@pytest.mark.parametrize(
    "spec, fields",
    [
        ("sink_protect:0.3", {"budget": 0.3, "recent_window": 7, "importance": "attention", "sinks": 4}),
        ("sink_protect::absmax", {"budget": 0.5}),
        ("sink_protect:0.3::kv_norm:layer", {"importance": "kv_norm", "scope": "layer"}),
        ("sink_protect:0.3:sinks=16:decay=0.01", {"sinks": 16, "decay": 0.01}),
        ("random:0.3:seed=5:recent_window=9", {"seed": 5, "recent_window": 9}),
        ("paper_greedy:0.3", {"importance": "positional", "scope": "token", "recent_window": 0}),
        ("paper_random:0.3", {"importance": "random", "scope": "token"}),
        ("paper_sink_protect:0.3:sinks=0", {"sinks": 0, "importance": "positional"}),
    ],
)
def test_methods_by_name(spec, fields):
    method = parse_method(spec, recent_window=7)
    assert {key: getattr(method.policy, key) for key in fields} == fields
    assert method.codec == ("absmax" if "paper" in spec or "absmax" in spec else DEFAULT_CODEC)
    assert method.spec == spec


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nothing:0.3", "unknown method 'nothing'"),
        ("greedy:much", "budget 'much' is no number"),
        ("greedy:0.1", "serves budgets from 0.25"),
        ("greedy:0.3:a:b:c:d", "too many fields"),
        ("paper_greedy:0.3:absmax", "too many fields"),
        ("greedy:0.3:depth=3", "unknown option 'depth'"),
        ("greedy:0.3:sinks=few", "sinks is a int, got 'few'"),
        ("greedy:0.3:sinks=-1", "sinks is a number of tokens"),
    ],
)
def test_bad_methods_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


def test_families_at_budgets():
    families = ["sink_protect", "sink_protect::absmax", "greedy:sinks=0", "snapkv"]
    specs = at_budgets(families, [0.25, 0.5])
    assert specs[::2] == ["sink_protect:0.25", "sink_protect:0.25:absmax", "greedy:0.25:sinks=0", "snapkv:0.25"]
    assert [family_of(spec) for spec in specs[::2]] == families
    with pytest.raises(ValueError, match="budget of its own"):
        at_budgets(["greedy:0.3"], [0.5])


def test_results_resume(tmp_path):
    path = tmp_path / "results.json"
    calls = []

    def cell(value):
        calls.append(value)
        return {"value": value}

    first = Results(path, {"tokens": 5}, {"torch": "1"})
    assert first.cell("a", lambda: cell(1)) == {"value": 1}
    again = Results(path, {"tokens": 5}, {"torch": "1"})
    assert again.cell("a", lambda: cell(2)) == {"value": 1}
    assert again.cell("b", lambda: cell(3)) == {"value": 3}
    assert calls == [1, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert json.loads(path.read_text())["cells"] == {"a": {"value": 1}, "b": {"value": 3}}


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"tokens": 5, "model": "x"}, {"torch": "1"}).cell("a", dict)
    with pytest.raises(ValueError, match=r"another settings \(tokens\)"):
        Results(path, {"tokens": 6, "model": "x"}, {"torch": "1"})
    with pytest.raises(ValueError, match=r"another environment \(torch\)"):
        Results(path, {"tokens": 5, "model": "x"}, {"torch": "2"})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": 3, "settings": {}, "environment": {}}', "{{{"])
def test_damaged_results_are_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no file of results"):
        Results(path, {}, {})
    assert path.read_text() == content


def test_markdown_table():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x/y | 1 |\n"


@pytest.mark.parametrize(
    ("spec", "budget"),
    [("sink_protect:0.3", "0.3"), ("calibrated:0.2", "0.2"), ("snapkv:0.3", "snapkv:0.3"), ("kivi:2", "kivi:2")],
)
def test_figures_name_policies_by_budget_and_others_whole(spec, budget):
    assert needles._budget(spec) == budget
