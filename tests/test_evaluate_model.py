"""The steps that `examples/evaluate_model.py` runs for an 8B model: they parse, resume, and run at tiny sizes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import evaluate_model
import families
import pytest
import tiny
from datasets import load_dataset
from test_readme import parse

ROOT = Path(__file__).parents[1]
FULL = ["--model", "meta-llama/Llama-3.1-8B-Instruct", "--output", "results/8b"]
LOCAL = [*FULL, "--text-file", "a text.txt", "--data-dir", "data sets"]


def arguments(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, words)])
    return evaluate_model.parse_args()


@pytest.mark.parametrize("words", [FULL, LOCAL, ["--dry-run", "--output", "dry"]], ids=["hub", "local", "dry"])
def test_commands_parse(words, monkeypatch, capsys):
    steps = list(evaluate_model.steps_of(arguments(monkeypatch, words)))
    names = [step.name for step in steps]
    assert len({*names}) == len(names) >= 9
    outputs = []
    for step in steps:
        try:
            own = parse(step.words)
        except SystemExit:
            pytest.fail(f"{step.name}: {capsys.readouterr().err}")
        assert own.model == ("smollm2" if "--dry-run" in words else FULL[1])
        if step.name != "probe":
            outputs.append((own.output if "output" in own else own.json, vars(own).get("experiment")))
        if words == LOCAL:
            assert getattr(own, "text_file", None) in (None, Path("a text.txt"))
            assert getattr(own, "data_dir", None) in (None, Path("data sets"))
    assert len({*outputs}) == len(outputs)  # no step finds the results of another
    experiments = {experiment for _, experiment in outputs} - {None}
    assert experiments == {"budget-sweep", "ruler", "needles", "generation"}


def test_a_dry_run_has_the_same_steps(monkeypatch):
    full, dry = (
        [step.name for step in evaluate_model.steps_of(arguments(monkeypatch, words))]
        for words in (FULL, ["--dry-run", "--output", "dry"])
    )
    assert [name for name in full if name[-1].isalpha()] == [name for name in dry if name[-1].isalpha()]
    assert [name for name in full if not name[-1].isalpha()] == [f"ruler-lm-eval-{n}" for n in (4096, 8192, 16384)]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "steps.toml"
    steps = [f'[[steps]]\nname = "{name}"\nminutes = 90\ncommand = "spectrumkv {name} $size"\n' for name in "abc"]
    path.write_text("\n".join(['[full]\nsize = "large"', '[dry]\nsize = "small"', *steps]))
    return path


def test_what_is_done_is_not_run_again(config, tmp_path, monkeypatch, capsys):
    ran, broken = [], {"b"}

    def executed(words, output):
        ran.append(words)
        return words[1] not in broken

    monkeypatch.setattr(evaluate_model, "executed", executed)
    words = ["--model", "m", "--config", config, "--output", tmp_path / "out"]

    def main(*more):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, words), *more])
        evaluate_model.main()

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and "failed: b" in capsys.readouterr().err
    assert [each[1:] for each in ran] == [["a", "large"], ["b", "large"], ["c", "large"]]  # one that fails stops none
    broken.clear()
    main()
    assert [each[1] for each in ran] == ["b"]
    main()
    assert not ran
    config.write_text(config.read_text().replace("large", "larger"))
    main("--only", "c")
    assert ran == [["spectrumkv", "c", "larger"]]
    main("--list")
    assert not ran and "# all: about 4.5 hours by estimate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("--only", "d")
    assert "no step d: a, b, c" in capsys.readouterr().err
    config.write_text(config.read_text().replace("$size", "$width"))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "step a names $width, which is not set" in capsys.readouterr().err


def test_a_model_is_named_but_in_a_dry_run(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        arguments(monkeypatch, ["--output", "x"])
    assert "--model is required" in capsys.readouterr().err


def test_commands_run_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate_model.executed(["spectrumkv", "--version"], tmp_path / "out.txt")
    shown = capsys.readouterr().out
    assert shown.startswith("spectrumkv-hf ") and (tmp_path / "out.txt").read_text() in shown
    assert evaluate_model.executed(["python", "kernels/hub_layout.py", "laid out"], tmp_path / "out.txt")
    assert (tmp_path / "laid out").is_dir()
    assert not evaluate_model.executed(["python", "examples/nothing.py"], tmp_path / "out.txt")


def test_made_up_data_is_read_like_the_hubs(tmp_path):
    evaluate_model.dry_data(tmp_path)
    rows = load_dataset(str(tmp_path / evaluate_model.LONGBENCH), "lcc_e", split="test", cache_dir=tmp_path / "cache")
    assert rows[0]["answers"] == ["the Moon"] and "the sea" in rows[0]["context"]
    both = load_dataset(str(tmp_path / "openai/gsm8k"), "main", cache_dir=tmp_path / "cache")
    assert {*both} == {"train", "test"} and both["test"][0]["answer"].endswith("#### 4")


@pytest.mark.slow
def test_dry_run(tmp_path, monkeypatch):
    """All steps for real on a tiny random model; a second run does nothing."""
    for module in ("wonderwords", "jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(module)
    output = tmp_path / "out"
    model = tmp_path / "model"
    families.model("llama", head_dim=32).save_pretrained(model)  # which KIVI's groups divide
    words = tiny.tokenizer()
    words.eos_token = "<s>"  # lm-eval asks for one
    words.save_pretrained(model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of verdicts and of data sets
    code = [sys.executable, str(ROOT / "examples/evaluate_model.py"), "--dry-run", "--model", model, "--output", output]
    result = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    done = json.loads((output / "done.json").read_text())
    assert {*done} == {path.stem for path in output.glob("*.txt")} and len(done) == 9
    for name in ("budget-sweep", "ruler", "needles", "generation"):
        assert json.loads((output / f"{name}.json").read_text())["table"]["rows"]
    for name, tasks in (("longbench", 2), ("ruler-lm-eval-1000", 1), ("gsm8k", 1)):
        cells = json.loads((output / f"{name}.json").read_text())["cells"]
        assert len(cells) == 2 * tasks
        for key, cell in cells.items():
            assert (cell["cache"]["nominal_ratio"] < 1) == (not key.endswith("exact"))
    assert json.loads((output / "decode.json").read_text())["results"]["0.5"]["milliseconds"] > 0
    again = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines() == [f"{name}: done before" for name in done]
    assert all(shlex.split(each["command"])[0] in ("spectrumkv", "python") for each in done.values())
