"""The prefill/decode examples."""

import json
import subprocess
import sys
from pathlib import Path

import limited_link
import pd_disaggregation
import pytest
import torch

from spectrumkv_hf.evaluation.subjects import models

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["--streamed", "--whole", "--transport=file", "--transport=nixl", "--model=random-smollm2-135m", "--key-file=key"],
)
def test_two_processes_answer_as_one(how, tmp_path):
    """The example compares the answers itself, and fails where they differ."""
    if not how.startswith("--model"):
        try:
            models.smollm2_file()
        except FileNotFoundError as problem:
            pytest.skip(str(problem))
    if how.endswith("nixl"):
        pytest.importorskip("nixl_cu12")
    report = tmp_path / "report.json"
    command = [sys.executable, EXAMPLES / "pd_disaggregation.py", "--tokens", "300", "500", "--json", report, how]
    command += ["--dtype", "bfloat16", "--budget", "0.3"]
    (tmp_path / "key").write_bytes(bytes(32))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["results"]
    assert [row["tokens"] for row in rows] == [300, 500]
    assert all(row["sent_bytes"] < 0.8 * row["fp16_bytes"] for row in rows)


def test_a_model_of_random_weights_is_the_same_in_every_process(monkeypatch):
    """As are its prompts: it has no tokenizer."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(models.RANDOM, "random-tiny", {**shape, "vocab_size": 77})
    state = torch.get_rng_state()
    one, other = (models.load_random("random-tiny", torch.float32, torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, other)]
    assert torch.equal(*weights) and weights[0].std() > 0
    mine, theirs = (pd_disaggregation.prompts(model, None, [5, 9]) for model in (one, other))
    assert [ids.shape for ids in mine] == [(1, 5), (1, 9)] and all(map(torch.equal, mine, theirs))
    assert 0 <= int(mine[1].min()) < int(mine[1].max()) < 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "unknown policy"),
        (["--tokens", "0"], "--tokens are 1 or more"),
        (["--json", "no/such/file"], "there is no folder"),
        (["--key-file", "no/such/file"], "No such file"),
        (["--key-file", __file__], r"key is 16 to 64 bytes, or None, got"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pd_disaggregation.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        pd_disaggregation.main()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(limited_link.missing() is not None, reason=f"no link: {limited_link.missing()}")
def test_link_is_limited_and_leaves_nothing():
    link = limited_link.Link()
    try:
        link.limit(1e6)
        for space, end in zip(link.spaces, link.ends, strict=True):
            shown = subprocess.run(["tc", "-n", space, "qdisc", "show", "dev", end], capture_output=True, text=True)
            assert "tbf" in shown.stdout and "8Mbit" in shown.stdout
        with pytest.raises(OSError, match=f"ip netns add {link.spaces[0]}: "):
            limited_link.run("ip", "netns", "add", link.spaces[0])
    finally:
        link.close()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(space in left for space in link.spaces)


def test_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(limited_link.shutil, "which", lambda name: None if name == "tc" else name)
    monkeypatch.setattr(sys, "argv", ["limited_link.py"])
    limited_link.main()
    assert "skipped: no limited link can be made here: tc not found: install iproute2" in capsys.readouterr().out


def test_break_even_is_where_the_lines_cross():
    def case(policy, budget, streamed, seconds):
        return {
            "policy": policy,
            "budget": budget,
            "streamed": streamed,
            "first_token_seconds": seconds,
            "sent_bytes": 100 * budget,
            "prefill_seconds": 5.0,
            "compress_seconds": 1.0,
        }

    def rate(bandwidth, exact, ours):
        both = [
            case(*kind, seconds)
            for streamed in (False, True)
            for kind, seconds in ((("fp16", 1.0, streamed), exact), (("sink_protect", 0.5, streamed), ours))
        ]
        return {"measured_bytes_per_second": bandwidth, "cases": both}

    report = {"fp16_sent_bytes": 100.0, "layers": 10, "rates": [rate(1000.0, 5.0, 6.0), rate(10.0, 15.0, 14.0)]}
    found = limited_link.break_even(report, 0.5)
    assert found["whole"]["measured"] == pytest.approx(100.0)
    assert found["whole"]["model"] == pytest.approx(50.0)
    report["rates"] = report["rates"][:1]
    assert limited_link.break_even(report, 0.5)["whole"]["measured"] is None
