"""The embedded SmolLM2-135M: examples, and the quality that the tables show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectrumkv_hf import get_policy
from spectrumkv_hf.commands.main import main
from spectrumkv_hf.evaluation.protocols.quality import measure
from spectrumkv_hf.evaluation.subjects import models
from spectrumkv_hf.evaluation.subjects.methods import Tiered
from spectrumkv_hf.evaluation.subjects.text import text_windows
from spectrumkv_hf.policy import SinkProtect
from spectrumkv_hf.probe import CalibrationProbe, probe_model
from spectrumkv_hf.probe.passage import passage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed():
    try:
        models.smollm2_file()
    except FileNotFoundError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def smollm2(installed):
    return models.load("smollm2", torch.float32)


def test_generate_example(installed, tmp_path):
    arguments = ["--max-new-tokens", "4", "--repeats", "1", "--context", "200", "--continuation", "16"]
    arguments += ["--prompt", passage()[:2600], "--policy", "sink_protect"]  # a plan and the whole take minutes
    plot, report = tmp_path / "tiers.png", tmp_path / "report.json"
    command = [sys.executable, ROOT / "examples/generate.py", *arguments, "--plot", plot, "--json", report]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {row["cache"]: row for row in json.loads(report.read_text())["results"]}
    assert (
        rows["SpectrumCache b=0.25"]["kv_mib"] < rows["SpectrumCache b=0.5"]["kv_mib"] < rows["DynamicCache"]["kv_mib"]
    )
    assert rows["SpectrumCache b=0.5"]["times_smaller"] > 2 > rows["DynamicCache"]["times_smaller"] == 1
    assert "times smaller" in result.stdout and "Warning" not in result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_examples_report_bad_arguments():
    command = [sys.executable, ROOT / "examples/generate.py", "--policy", "greedy", "--budgets", "0.1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: policy 'greedy' serves budgets from 0.25 to 1" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_reduced_evaluation(tmp_path):
    """`make eval`: every experiment on a small grid, with the numbers that even such a grid must give."""
    try:
        models.smollm2_file()
    except FileNotFoundError as problem:
        pytest.skip(str(problem))
    main(["eval", "all", "--reduced", "--output", str(tmp_path)])
    assert "Not measured" not in (tmp_path / "tables.md").read_text()

    def rows(name):
        table = json.loads((tmp_path / f"{name}.json").read_text())["table"]
        return {row[0]: dict(zip(table["header"], row, strict=True)) for row in table["rows"]}

    kl = {spec: float(row["KL (nats)"]) for spec, row in rows("perplexity").items()}
    assert kl["sink_protect:0.5"] < 1e-4 < kl["sink_protect:0.3"] < 0.003
    assert kl["sink_protect:0.3"] < kl["random:0.3"] < kl["paper_greedy:0.3"] < kl["drop_scored:0.3"]
    changes = {spec: float(row["ΔPPL %"]) for spec, row in rows("paper-perplexity").items()}
    assert abs(changes["greedy:0.5"]) < 1 < changes["greedy:0.3"]
    assert changes["greedy:0.5"] == changes["random:0.5"]  # at b=.5 both are uniform INT8
    errors = {spec: float(row["rel. L2 K"]) for spec, row in rows("layer-error").items()}
    assert errors["uniform_int4"] < errors["uniform_int4::absmax"] / 2
    needles = {spec: row["found"] for spec, row in rows("needles").items()}
    assert needles["exact"] == needles["sink_protect:0.3"] == "2/2" != needles["drop_window:0.3"]


@pytest.mark.slow
def test_probe(smollm2, tmp_path, monkeypatch):
    """INT4 is safe with our codec, and not with the paper's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours, papers = (probe_model(*smollm2, CalibrationProbe(codec=codec)) for codec in ("spectrum", "absmax"))
    assert ours.control == papers.control == 0
    assert ours.safe == ("fp16", "int8", "int4") and ours.cheapest == SinkProtect(budget=0.25)
    assert papers.safe == ("fp16", "int8") and papers.int4.kl_keys > 10 * papers.int4.kl_values
    assert papers.int4.kl > 5 * ours.int4.kl


@pytest.mark.slow
def test_quality_on_the_passage(smollm2):
    model, tokenizer = smollm2
    windows = text_windows(tokenizer, passage(), 1280)
    policies = {
        "0.5": get_policy("sink_protect", 0.5, recent_window=0),
        "0.3": get_policy("sink_protect", 0.3, recent_window=0),
        "random": get_policy("random", 0.3, recent_window=0),
        "drop_window": get_policy("drop_window", 0.3, recent_window=0),
        "drop_scored": get_policy("drop_scored", 0.3, recent_window=0),
    }
    methods = [Tiered(name, policy) for name, policy in policies.items()]
    got = {name: q.kl for name, q in measure(model, windows, 1024, methods).items()}
    assert got["0.5"] < 1e-4
    assert got["0.3"] < 0.003
    assert got["0.3"] < got["random"]
    assert 20 * got["0.3"] < min(got["drop_window"], got["drop_scored"])
