"""The modules for `evaluate`: offline, against float64, over any cache, and as `spectrumkv eval` reports by them."""

import ast
import doctest
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import redraw_figures
import tiny
import torch
from families import model, prompt
from quanto import import_quanto
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache, pipeline

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.commands.main import main
from spectrumkv_hf.evaluation import metrics
from spectrumkv_hf.evaluation.protocols.quality import Quality, summarise
from spectrumkv_hf.evaluation.subjects.methods import parse_method
from spectrumkv_hf.probe.needles import found
from spectrumkv_hf.probe.passage import passage

evaluate = pytest.importorskip("evaluate")

from datasets import Dataset  # noqa: E402  # which evaluate brings

from spectrumkv_hf.evaluation.protocols.generation import CacheTextGenerationEvaluator  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

RESULTS = Path(__file__).parents[2] / "results"

OFFLINE = """
import json, socket, sys

def connect(*_):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = connect
import evaluate

for path, kind in json.loads(sys.argv[1]):
    print(evaluate.load(path, module_type=kind).name)
"""


def script(name):
    return metrics.path_of(name) / f"{name}.py"


def test_they_load_from_their_folders_without_a_network(tmp_path):
    """In a process that has nothing cached, and from a copy of the folders elsewhere."""
    folder = Path(shutil.copytree(metrics.path_of("kv_memory").parent, tmp_path / "copied"))
    jobs = [(str(folder / name), kind) for name, kind in metrics.MODULES.items()]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_EVALUATE_OFFLINE": "1", "PYTHONPATH": ""}
    code = [sys.executable, "-c", OFFLINE, json.dumps(jobs)]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*metrics.MODULES]


@pytest.mark.parametrize("name", metrics.MODULES)
def test_their_imports_are_those_that_evaluate_finds(name):
    """Its pattern reads single lines; what it does not find is not checked for, or copied beside the script."""
    tree = ast.parse(script(name).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(node.lineno == node.end_lineno and node.col_offset == 0 for node in imports)
    assert all(len(node.names) == 1 for node in imports if isinstance(node, ast.Import))
    tops = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0] for node in imports}
    seen = evaluate.loading.get_imports(str(script(name)))
    assert {top for _, top, _, _ in seen} == tops and {kind for kind, *_ in seen} == {"library"}
    assert "spectrumkv_hf" not in tops


@pytest.mark.parametrize("name", metrics.MODULES)
def test_their_examples(name):
    module = metrics.load(name)
    names = {"evaluate": evaluate, "path": str(metrics.path_of(name))}
    test = doctest.DocTestParser().get_doctest(module.inputs_description, names, name, None, 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_an_unknown_module_is_refused():
    with pytest.raises(ValueError, match="no module 'accuracy': choose from kv_divergence, needle_recall, kv_memory"):
        metrics.load("accuracy")
    with pytest.raises(ValueError, match="configurations default and logits, got 'other'"):
        metrics.load("kv_divergence", "other")


def windows(count=3, tokens=40, vocabulary=61):
    """`(exact, other, ids)` of random logits, close enough for the first to be the same at most positions."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        exact = 3 * torch.randn(tokens, vocabulary, generator=generator)
        other = exact + 0.3 * torch.randn(tokens, vocabulary, generator=generator)
        yield exact, other, torch.randint(vocabulary, (tokens,), generator=generator)


def direct(exact, other, ids):
    """One window by PyTorch's own functions in float64."""
    p, q = exact.double(), other.double()
    return {
        "kl": float(kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")),
        "agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "loss": float(cross_entropy(q[:-1], ids[1:])),
        "exact_loss": float(cross_entropy(p[:-1], ids[1:])),
    }


def expected(parts):
    """Results over the windows, of what `direct` says of each."""
    mean = {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
    differences = [part["loss"] - part["exact_loss"] for part in parts]
    ratio = math.exp(mean["loss"]) / math.exp(mean["exact_loss"])

    def error(values):
        return statistics.stdev(values) / math.sqrt(len(parts))

    return {
        **mean,
        "kl_error": error([part["kl"] for part in parts]),
        "agreement_error": error([part["agreement"] for part in parts]),
        "perplexity": math.exp(mean["loss"]),
        "exact_perplexity": math.exp(mean["exact_loss"]),
        "perplexity_change": 100 * (ratio - 1),
        "perplexity_change_error": 100 * ratio * error(differences),
        "windows": len(parts),
    }


def test_divergence_against_float64():
    """Of tokens, which are reduced in float32, and of logits, which the module takes in float64."""
    data = list(windows())
    want = expected([direct(*window) for window in data])
    assert want["agreement_error"] > 0 and 0.5 < want["agreement"] < 1 < want["perplexity_change"]
    by_token = metrics.load("kv_divergence")
    for window in data:
        by_token.add(**metrics.token_divergence(*window))
    assert by_token.compute() == pytest.approx(want, rel=1e-5)
    exact, other, ids = (torch.stack(part) for part in zip(*data, strict=True))
    by_logits = metrics.load("kv_divergence", "logits")
    assert by_logits.compute(predictions=other, references=exact, input_ids=ids) == pytest.approx(want, rel=1e-9)
    probabilities = {"predictions": other.log_softmax(-1).numpy(), "references": exact.log_softmax(-1).numpy()}
    assert by_logits.compute(**probabilities, input_ids=ids.numpy()) == pytest.approx(want, rel=1e-5)


def test_means_of_windows_are_enough():
    """Which is what stored results hold."""
    parts = [direct(*window) for window in windows()]
    inputs = {name: [[part[name]] for part in parts] for name in parts[0]}
    assert metrics.load("kv_divergence").compute(**inputs) == pytest.approx(expected(parts), rel=1e-12)


def test_what_is_not_known_is_none():
    exact, other, _ = next(windows())
    metric = metrics.load("kv_divergence")
    metric.add(**metrics.token_divergence(exact, other))
    result = metric.compute()
    assert result["kl"] > 0 and result["windows"] == 1
    none = {name for name, value in result.items() if value is None}
    assert none == result.keys() - {"kl", "agreement", "windows"}


def test_tokens_that_no_run_allows_do_not_count():
    """A row of logits with -inf has the divergence of the row without it; only in one run: it is infinite."""
    exact, other, ids = next(windows())
    masked = [torch.cat((logits, torch.full((len(ids), 1), -torch.inf)), 1) for logits in (exact, other)]
    want = direct(exact, other, ids)["kl"]
    by_logits = metrics.load("kv_divergence", "logits")
    assert statistics.fmean(metrics.token_divergence(*masked)["kl"]) == pytest.approx(want, rel=1e-5)
    result = by_logits.compute(predictions=masked[1][None], references=masked[0][None], input_ids=[[]])
    assert result["kl"] == pytest.approx(want, rel=1e-9)
    allowed = torch.cat((exact, torch.zeros(len(ids), 1)), 1)
    assert metrics.token_divergence(allowed, masked[1])["kl"] == [math.inf] * len(ids)
    assert by_logits.compute(predictions=masked[1][None], references=allowed[None], input_ids=[[]])["kl"] == math.inf


def test_numbers_that_are_none_stay_visible():
    exact, other, _ = next(windows())
    other[3, 5] = math.nan
    by_logits = metrics.load("kv_divergence", "logits")
    wrong = [index for index, value in enumerate(metrics.token_divergence(exact, other)["kl"]) if math.isnan(value)]
    assert wrong == [3]
    logits = {"predictions": torch.stack((other, exact)), "references": torch.stack((exact, exact))}
    result = by_logits.compute(**logits, input_ids=[[], []])
    assert math.isnan(result["kl"]) and math.isnan(result["kl_error"]) and result["agreement_error"] > 0


ONE = {"kl": [[0.1]], "agreement": [[1]], "loss": [[2]], "exact_loss": [[2]]}


@pytest.mark.parametrize(
    "config, inputs, message",
    [
        ("default", dict.fromkeys(ONE, []), "one window or more"),
        (
            "default",
            {name: [[0.1], []] for name in ONE},
            "kl is known of all windows or of none, and is empty in window 1",
        ),
        ("default", ONE | {"loss": [[2, 3]]}, "different numbers"),
        ("default", ONE | {"agreement": []}, "Mismatch in the number of kl"),
        ("logits", {"predictions": [[[1, 2]]], "references": [[[1, 2, 3]]], "input_ids": [[]]}, "of one shape"),
        ("logits", {"predictions": [[[1, 2]]], "references": [[[1, 2]]], "input_ids": [[0, 1]]}, "and 2 input_ids"),
        ("logits", {"predictions": [[[1, 2]]], "references": [[[1, 2]]], "input_ids": [[2]]}, "0 to 1, got 2 to 2"),
    ],
)
def test_bad_windows_are_refused(config, inputs, message):
    with pytest.raises(ValueError, match=message):
        metrics.load("kv_divergence", config).compute(**inputs)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), None), ((1, 2, 3), (1, 2, 3), None), ((0, 3), (0, 3), None)])
def test_logits_that_do_not_fit_are_refused(shapes):
    exact, other, _ = shapes
    with pytest.raises(ValueError, match="of both runs alike, got"):
        metrics.token_divergence(torch.zeros(exact), torch.zeros(other))
    with pytest.raises(ValueError, match="as many as the 2 of the logits"):
        metrics.token_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))


def test_recall_counts_as_the_needles_do():
    texts = ["It is unicorn7!", "UNICORN", "", "The name: ZANTHOR", "Zan thor"]
    answers = ["UNICORN7", "UNICORN7", "UNICORN7", "Zanthor", "Zanthor"]
    hits = [found([text], answer)[0] for text, answer in zip(texts, answers, strict=True)]
    result = metrics.load("needle_recall").compute(predictions=texts, references=answers)
    assert hits == [True, False, False, True, False]
    assert result == {"recall": 2 / 5, "found": sum(hits), "total": 5}


def test_recall_needs_texts_and_answers():
    recall = metrics.load("needle_recall")
    with pytest.raises(ValueError, match="one text or more"):
        recall.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="answer of text 1 is empty"):
        metrics.load("needle_recall").compute(predictions=["a", "b"], references=["a", ""])


def test_memory_adds_caches_up():
    got = metrics.load("kv_memory").compute(stored=[100, 300], exact=[400, 600])
    assert got == {"stored": 400, "exact": 1000, "ratio": 0.4, "times_smaller": 2.5, "caches": 2}


@pytest.mark.parametrize("stored, exact", [([], []), ([0], [1]), ([1], [0]), ([1], [math.inf]), ([-1], [1])])
def test_bad_bytes_are_refused(stored, exact):
    with pytest.raises(ValueError, match="positive and finite, got stored|needs one cache or more"):
        metrics.load("kv_memory").compute(stored=stored, exact=exact)


def filled(built, cache, *pieces):
    """A cache that was given these tokens, one forward each."""
    with torch.no_grad():
        for ids in pieces:
            built(ids, **cache_argument(cache))
    return cache


TOKEN = 2 * 2 * 2 * 16 * 4
"""Bytes of a token of the tiny llama: layers, sides, heads, channels, float32."""


def test_bytes_of_stock_caches():
    llama, ids = model("llama"), prompt(200)
    assert metrics.cache_bytes(filled(llama, DynamicCache(config=llama.config), ids)) == {
        "stored": 200 * TOKEN,
        "exact": 200 * TOKEN,
    }
    static = metrics.cache_bytes(filled(llama, StaticCache(config=llama.config, max_cache_len=512), ids))
    assert static["exact"] == 200 * TOKEN and 512 * TOKEN <= static["stored"] < 513 * TOKEN  # and its lengths
    both = EncoderDecoderCache(*(filled(llama, DynamicCache(config=llama.config), ids) for _ in range(2)))
    assert metrics.cache_bytes(both) == {"stored": 400 * TOKEN, "exact": 400 * TOKEN}


def test_bytes_of_a_window_are_those_of_its_tokens():
    gemma = model("gemma2")
    cache = filled(gemma, DynamicCache(config=gemma.config), prompt(200))
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert min(held) < 24 < max(held) == 200
    assert metrics.cache_bytes(cache)["exact"] == sum(held) * 2 * 2 * 32 * 4


def test_bytes_of_other_states_count_as_they_are():
    hybrid = model("qwen3_next")
    cache = filled(hybrid, DynamicCache(config=hybrid.config), prompt(50))
    got = metrics.cache_bytes(cache)
    assert got["stored"] == got["exact"] > 50 * 2 * 2 * 32 * 4


@pytest.mark.parametrize("backend, package, axis", [("quanto", "optimum.quanto", 0), ("hqq", "hqq.core.quantize", 1)])
@pytest.mark.parametrize("steps", [0, 3, 70], ids=lambda steps: f"{steps} steps")
def test_bytes_of_a_quantised_cache(backend, package, axis, steps):
    """The tokens behind its codes, and those that are still exact."""
    import_quanto() if backend == "quanto" else pytest.importorskip(package)
    llama, ids = model("llama", head_dim=64), prompt(128 + steps)
    cache = QuantizedCache(
        backend, llama.config, nbits=4, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=64
    )
    filled(llama, cache, ids[:, :128], *(ids[:, [index]] for index in range(128, 128 + steps)))
    got = metrics.cache_bytes(cache)
    assert got["exact"] == (128 + steps) * 4 * TOKEN
    assert got["exact"] / 9 < got["stored"] < got["exact"] / 3  # 4 bits of 32, scales, and exact tokens


def test_bytes_of_our_cache():
    llama = model("llama")
    cache = filled(llama, SpectrumCache(llama.config, budget=0.3), prompt(300))
    report = cache.memory()
    assert metrics.cache_bytes(cache) == {"stored": report.stored, "exact": report.exact}
    measurement = metrics.load("kv_memory")
    measurement.add(**metrics.cache_bytes(cache))
    assert measurement.compute()["times_smaller"] == report.times_smaller > 1.5


def test_a_cache_that_dropped_tokens_is_compared_with_what_it_was_given():
    llama, ids = model("llama"), prompt(200)
    whole = filled(llama, DynamicCache(config=llama.config), ids)
    pruned = filled(llama, DynamicCache(config=llama.config), ids)
    for layer in pruned.layers:
        layer.keys, layer.values = layer.keys[:, :, ::4].clone(), layer.values[:, :, ::4].clone()
    assert metrics.cache_bytes(pruned)["exact"] == 50 * TOKEN
    for exact in (whole, 200 * TOKEN):
        assert metrics.cache_bytes(pruned, exact) == {"stored": 50 * TOKEN, "exact": 200 * TOKEN}


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache, SpectrumCache])
def test_an_empty_cache_has_no_ratio(kind):
    config = model("llama").config
    empty = kind(config=config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    with pytest.raises(ValueError, match=f"a {kind.__name__} of .* bytes is compared with 0 bytes"):
        metrics.cache_bytes(empty)


def test_what_is_reported_is_what_float64_says(tmp_path):
    """`spectrumkv eval` on a tiny model: the file's full numbers against a computation of their definitions."""
    context, more, spec = 128, 40, "sink_protect:0.3"
    folder = tiny.save(tmp_path / "model")
    grid = ["--contexts", str(context), "--continuation", str(more), "--windows", "2", "--methods", spec]
    out = tmp_path / "out"
    main(["eval", "perplexity", "--model", folder, "--dataset", "passage", *grid, "--output", str(out)])
    held = json.loads((out / "perplexity.json").read_text())

    llama, method = model("llama"), parse_method(spec, recent_window=0)
    text = tiny.tokenizer()(passage(), return_tensors="pt").input_ids
    parts, ratios = [], []
    for ids in text[:, : 2 * (context + more)].split(context + more, dim=1):
        logits = []
        for cache in (DynamicCache(config=llama.config), method.cache(llama)):
            filled(llama, cache, ids[:, :context])
            if isinstance(cache, SpectrumCache):
                ratios.append(cache.memory().actual_ratio)
            with torch.no_grad():
                logits.append(llama(ids[:, context:], **cache_argument(cache)).logits[0])
        parts.append(direct(*logits, ids[0, context:]))
    want = expected(parts)
    assert want["kl"] > 1e-4

    (row,) = held["metrics"]
    assert row["method"] == spec and row["context"] == context
    # A KL of 1e-3 is what is left of terms a thousand times larger, in float32.
    assert row["kv_divergence"] == pytest.approx(want, rel=1e-3)
    assert row["kv_memory"]["ratio"] == pytest.approx(statistics.mean(ratios), rel=1e-12)
    table = dict(zip(held["table"]["header"], held["table"]["rows"][1], strict=True))
    assert table["top-1 %"] == f"{100 * want['agreement']:.1f}" and table["PPL"] == f"{want['perplexity']:.3f}"
    assert held["_evaluate_version"] == evaluate.__version__ and held["_timestamp"]
    assert str(tmp_path) not in json.dumps(held) and sys.executable not in json.dumps(held)


def test_results_are_whole_without_git(tmp_path, monkeypatch):
    """Which `evaluate.save` calls, and fails without."""
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tiny.save(tmp_path / "model")
    main(["eval", "needles", "--reduced", "--model", folder, "--output", str(tmp_path)])
    held = json.loads((tmp_path / "needles.json").read_text())
    assert [row["method"] for row in held["metrics"]] == ["exact", "sink_protect:0.3", "drop_window:0.3"]
    for row, shown in zip(held["metrics"], held["table"]["rows"], strict=True):
        cell = held["cells"][f"{row['method']} | UNICORN7"]
        recall = row["needle_recall"]
        assert (recall["found"], recall["total"]) == (sum(cell["found"]), len(cell["found"]))
        assert shown[1] == f"{row['kv_memory']['ratio']:.3f}" and row["kv_memory"]["ratio"] == cell["actual_ratio"]


def test_windows_that_were_measured_without_agreement():
    """All of them, or those of an earlier run that was resumed: it is not known of the whole."""
    first, second = Quality(0.1, 2.1, 2.0, 0.4, 0.3), Quality(0.3, 2.2, 2.0, 0.4, 0.3)
    for windows in ([first, second], [first, replace(second, agreement=0.9)]):
        summary = summarise("x", 10, windows)
        assert summary.mean.agreement is None and summary.mean == Quality.mean(windows)
    known = [replace(first, agreement=0.7), replace(second, agreement=0.9)]
    assert summarise("x", 10, known).mean.agreement == pytest.approx(0.8)


STORED = ("gemma3/sinks", "smollm2/context-length", "smollm2/needles-after", "smollm2/ttft")


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist has no results")
@pytest.mark.parametrize("name", STORED)
def test_stored_results_have_the_numbers_that_they_had(name):
    """Tables that were written before these modules computed them; what was not measured then is left empty."""
    path = RESULTS / "evaluation" / f"{name}.json"
    experiment = redraw_figures.experiment_of(path)
    table = experiment.table(redraw_figures.stored(experiment, path))
    written = json.loads(path.read_text())["table"]
    columns = [index for index, column in enumerate(table.header) if column in written["header"]]
    assert [table.header[index] for index in columns] == written["header"]
    assert sorted([row[index] for index in columns] for row in table.rows) == sorted(written["rows"])


PROMPTS = ["The secret code is UNICORN7. " * 6, "What is the code? " * 9, "Rain falls on the hills. " * 7]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def data():
    return Dataset.from_dict({"text": PROMPTS, "answer": ["a", "b", "c"]})


@pytest.fixture
def words():
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


class Kept:
    """A factory that keeps the caches it made, and a metric that keeps the texts it was given."""

    def __init__(self, make):
        self.make, self.caches, self.inputs = make, [], {}

    def __call__(self):
        self.caches.append(self.make())
        return self.caches[-1]

    def compute(self, **inputs):
        self.inputs = inputs
        return {"texts": len(next(iter(inputs.values())))}


def answers(llama, words, cache, prompts):
    inputs = words(prompts, return_tensors="pt", padding=True)
    output = llama.generate(**{key: inputs[key] for key in ("input_ids", "attention_mask")}, **cache, **GREEDY)
    return words.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("name", ["exact", "sink_protect:0.3"])
@pytest.mark.parametrize("as_pipeline", [False, True], ids=["model", "pipeline"])
def test_the_evaluator_takes_a_fresh_cache_a_batch(data, words, name, batch, as_pipeline):
    """The answers are those of `generate` over caches of the same kind."""
    llama, method = model("llama"), parse_method(name, recent_window=0)
    kept = Kept(lambda: method.cache(llama))
    given = pipeline("text-generation", model=llama, tokenizer=words) if as_pipeline else llama
    result = CacheTextGenerationEvaluator(kept, batch, GREEDY).compute(
        given, data, metric=kept, label_column="answer", tokenizer=words
    )
    batches = [PROMPTS[start : start + batch] for start in range(0, len(PROMPTS), batch)]
    want = [text for part in batches for text in answers(llama, words, cache_argument(method.cache(llama)), part)]
    assert kept.inputs == {"predictions": want, "references": ["a", "b", "c"]} and any(want)
    assert len(kept.caches) == len(batches)
    assert all(cache.get_seq_length() > 100 for cache in kept.caches)
    assert result["texts"] == 3 and result["total_time_in_seconds"] > 0


def test_the_evaluator_without_references(data, words):
    kept = Kept(lambda: DynamicCache(config=model("llama").config))
    evaluator = CacheTextGenerationEvaluator(kept, generation_kwargs=GREEDY | {"return_full_text": True})
    evaluator.compute(model("llama"), data, metric=kept, tokenizer=words)
    (texts,) = kept.inputs.values()
    assert [*kept.inputs] == ["data"]
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(texts, PROMPTS, strict=True))


def test_the_stock_evaluator_still_needs_a_subclass(data, words):
    """Where this fails, `prepare_pipeline` may go."""
    pipe = pipeline("text-generation", model=model("llama"), tokenizer=words)
    with pytest.raises(AttributeError, match="TFPreTrainedModel"):
        evaluate.evaluator("text-generation").compute(pipe, data, metric=metrics.load("needle_recall"))


def test_what_the_evaluator_can_not_take_is_refused(data, words):
    llama = model("llama")
    evaluator = CacheTextGenerationEvaluator(lambda: DynamicCache(config=llama.config), 2, GREEDY)
    recall = metrics.load("needle_recall")
    with pytest.raises(ValueError, match="batch_size is 1 or more, got 0"):
        CacheTextGenerationEvaluator(DynamicCache, 0)
    with pytest.raises(ValueError, match="label_column"):
        evaluator.compute(llama, data, metric=recall, tokenizer=words, label_column="label")
    with pytest.raises(ValueError, match="a model, its name or a pipeline, got NoneType"):
        evaluator.compute(None, data, metric=recall, tokenizer=words)
    with pytest.raises(ValueError, match="metric"):
        evaluator.compute(llama, data, tokenizer=words)
    pipe = pipeline("text-generation", model=llama, tokenizer=words)
    pipe.tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match="padded on the left"):
        evaluator.compute(pipe, data, metric=recall)
