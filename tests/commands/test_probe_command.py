"""`spectrumkv probe`, on a small model in a folder."""

import json

import pytest
from outliers import healthy, with_outliers

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.commands import probe as command
from spectrumkv_hf.commands.main import main
from spectrumkv_hf.policy import SinkProtect
from spectrumkv_hf.probe import CalibrationProbe, PaperProbe, PaperVerdict, Trial, auto

SHORT = ["--context", "200", "--continuation", "40", "--device", "cpu"]


@pytest.fixture(autouse=True)
def probed(tmp_path, monkeypatch):
    """A model with outliers instead of one from a hub, and a storage of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "_remembered", {})
    m = with_outliers(healthy(), layer=1)
    monkeypatch.setattr(command, "load_from", lambda args: (m, None))
    return m


def run(capsys, *arguments):
    main(["probe", "somewhere/model", *arguments])
    return capsys.readouterr().out


def test_progress_is_on_stderr(capfd):
    main(["probe", "somewhere/model", *SHORT, "--json"])
    said = capfd.readouterr()
    assert "Probing once which tiers Qwen2ForCausalLM tolerates" in said.err and json.loads(said.out)


def test_json(capsys, probed, monkeypatch):
    said = json.loads(run(capsys, *SHORT, "--codec", "absmax", "--json", "--budget", ".3", "--budget", ".5"))
    assert said["model"] == "somewhere/model" and said["probe"] == "calibration"
    assert said["safe"] == ["fp16"]
    assert said["verdict"]["int4"]["unsafe"] == [1] and len(said["verdict"]["int4"]["layers"]) == 3
    assert said["cheapest"]["floors"] == [[1, "fp16"]] and said["cheapest"]["cost"] == pytest.approx(0.5)
    assert said["policies"]["0.3"]["budget"] == 0.3 and said["policies"]["0.5"]["budget"] == 0.6  # cheaper than a floor
    with open(said["stored"], encoding="utf-8") as file:
        assert json.load(file)["verdict"] == said["verdict"]
    # and from_model finds it
    monkeypatch.setattr(auto, "_remembered", {})
    monkeypatch.setattr(CalibrationProbe, "measure", None)
    probe = CalibrationProbe(codec="absmax", context=200, continuation=40)
    cache = SpectrumCache.from_model(probed, budget=0.3, codec="absmax", probe=probe)
    assert cache.policy == SinkProtect(budget=0.3, floors={1: "fp16"})


def test_tables(capsys):
    said = run(capsys, *SHORT, "--codec", "absmax", "--budget", "0.3")
    assert "3 layers tiered" in said and "fp16 (control)" in said and "int4 is not safe in layers 1;" in said
    assert (
        "cheapest policy: sink_protect b=0.25, fp16 or better in layers 1, nominal cost 0.500" in said
        and "policy at b=0.3: sink_protect b=0.3, fp16" in said
        and "stored in" in said
    )
    assert "yes" in run(capsys, *SHORT, "--codec", "spectrum").split("int4")[1]


def test_plan(capsys, probed):
    plan = [*SHORT, "--budget", "0.35", "--budget", "0.5"]
    said = run(capsys, *plan)
    assert "codec spectrum2, 40 tokens over the cache of 200 (random tokens), 3 layers tiered" in said
    assert "KL at 2 bits" in said and "b=0.35" in said and "policy at b=0.5: calibrated b=0.5" in said
    rows = [line for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 3 and all("%" in row for row in rows)
    found = json.loads(run(capsys, *plan, "--json"))
    assert found["probe"] == "plan" and found["policies"]["0.35"]["budget"] == 0.35
    assert [layer["layer"] for layer in found["verdict"]["layers"]] == [0, 1, 2]


def test_fresh(capsys, monkeypatch):
    seconds = [json.loads(run(capsys, *SHORT, "--json", *more))["verdict"]["seconds"] for more in ([], [], ["--fresh"])]
    assert seconds[0] == seconds[1] != seconds[2]


@pytest.mark.parametrize(
    ("found", "verdict"), [("yyy", "passed: three tiers"), ("ynn", "failed: two tiers"), (None, "inconclusive")]
)
def test_the_papers_probe(capsys, monkeypatch, found, verdict):
    trials = tuple(
        Trial(answer="UNICORN7", depth=0.5, exact=found is not None, tiered=c == "y") for c in (found or "nnn")
    )
    said = PaperVerdict(codec="absmax", tokens=400, trials=trials, seconds=1.0)
    monkeypatch.setattr(PaperProbe, "inputs", lambda self, m, t: healthy().model.embed_tokens.weight[:1].long())
    monkeypatch.setattr(PaperProbe, "measure", lambda *args: said)
    assert verdict in run(capsys, "--probe", "paper", "--tokens", "400")
    told = json.loads(run(capsys, "--probe", "paper", "--tokens", "400", "--json", "--budget", "0.3"))
    assert (told["passed"], told["conclusive"]) == (found == "yyy", found is not None)
    assert told["policies"]["0.3"]["probe_passed"] is (found == "yyy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probe", "paper", "--loss", "0.1"], "--loss is an option of --probe calibration"),
        (["--tokens", "100"], "--tokens is an option of --probe paper"),
        (["--loss", "0.1"], "--loss is an option of --probe calibration"),
        (["--probe", "calibration", "--loss", "-1"], "loss is a positive number"),
        (["--context", "5000"], "the model takes 1024 tokens"),
    ],
)
def test_problems_that_the_user_can_mend(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["probe", "somewhere/model", *arguments])
    assert message in capsys.readouterr().err
