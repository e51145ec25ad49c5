"""lm-eval over our caches: with the exact cache it is stock `hf`, with a compressed one the stored cache is read."""

import json
import random
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import families
import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.commands import main as cli
from spectrumkv_hf.evaluation.subjects.methods import Method

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from spectrumkv_hf.commands import lm_eval as lm_eval_command
from spectrumkv_hf.commands.lm_eval import load_task, task_manager
from spectrumkv_hf.evaluation.subjects.lm_eval_model import SpectrumLM

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

WORDS = [f"w{i}" for i in range(3, families.COMMON["vocab_size"])]
EXAMPLES = Path(__file__).parents[2] / "examples/lm_eval_tasks"
COMPRESSED = {"policy": "sink_protect:0.3", "recent_window": 0}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; the ids are those of `families`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(words, rng):
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of each kind that a model class serves, with documents of different lengths."""
    path, rng = tmp_path_factory.mktemp("tasks"), random.Random(5)
    choices = [
        {"context": text(length, rng), "choices": [text(n, rng) for n in (1, 1, 2, 5)], "gold": length % 4}
        for length in (150, 203, 150)
    ]
    documents = {
        "rolling": [{"text": text(length, rng)} for length in (300, 450)],
        "choice": choices,
        "generation": [{"context": text(length, rng), "answer": "w4"} for length in (160, 203, 140)],
        "short": [{"context": text(20, rng), "answer": "w4"}],
    }
    exact_match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    generation = {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [" w1", " w5"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": exact_match,
    }
    tasks = {
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_target": "gold",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "generation": generation,
        "short": generation,
    }
    for name, task in tasks.items():
        data = path / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, documents[name])))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **task}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return path


def language_model(cls, tokenizer, family="llama", **options):
    model = families.model(family)
    return cls(model, tokenizer=tokenizer, **{"max_length": 400, "batch_size": 1, **options})


def responses(lm, folder, *names):
    """What a model answered to every request of the tasks, and the metrics."""
    got = simple_evaluate(
        lm, tasks=list(names), task_manager=task_manager(list(names), folder, None), bootstrap_iters=0
    )
    samples = {name: [sample["resps"] for sample in got["samples"][name]] for name in names}
    return samples, {name: got["results"][name] for name in names}


def flat(answers):
    if isinstance(answers, list | tuple):
        return [part for answer in answers for part in flat(answer)]
    return [answers]


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("llama", 2), ("gemma3", 2)])
def test_exact_is_stock(family, batch, tokenizer, folder):
    """Over a DynamicCache, chunk by chunk: lm-eval's own class in one forward without a cache."""
    names = ("rolling", "choice", "generation")
    stock, stock_metrics = responses(language_model(HFLM, tokenizer, family, batch_size=batch), folder, *names)
    ours = language_model(SpectrumLM, tokenizer, family, batch_size=batch, policy="exact", chunk=70)
    got, metrics = responses(ours, folder, *names)
    for name in ("rolling", "choice"):
        assert flat(got[name]) == pytest.approx(flat(stock[name]), rel=1e-5)
    assert got["generation"] == stock["generation"]
    lengths = [len(answer.split()) for answer in flat(got["generation"])]
    assert min(lengths) < 24, "no answer met a stop string"
    for name in names:
        for key, value in stock_metrics[name].items():
            if isinstance(value, float):
                assert metrics[name][key] == pytest.approx(value, rel=1e-5)
    assert ours.use.caches > ours.use.unread
    assert ours.use.summary()["nominal_ratio"] == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_compressed_caches_are_read(batch, tokenizer, folder, monkeypatch):
    ours = language_model(SpectrumLM, tokenizer, batch_size=batch, **COMPRESSED)
    exact = language_model(SpectrumLM, tokenizer, batch_size=batch, policy="exact")
    caches = []
    make = ours.method.cache
    monkeypatch.setattr(ours.method, "cache", lambda model: caches.append(make(model)) or caches[-1])
    names = ("rolling", "choice", "generation")
    got, _ = responses(ours, folder, *names)
    expected, _ = responses(exact, folder, *names)
    assert ours.use.caches == len(caches) == len({id(cache) for cache in caches})
    for cache in caches:
        bits = {int(b) for layer in cache.tier_map().values() for b in layer.unique()}
        assert {4, 8, 16} <= bits
    for name in ("rolling", "choice"):
        difference = torch.tensor(flat(got[name])) - torch.tensor(flat(expected[name]))
        assert (difference[difference != 0].numel()) >= len(got[name])
        assert difference.abs().max() < 20, "the caches are damaged rather than rounded"
    assert 0.25 < ours.use.summary()["nominal_ratio"] < 0.6
    assert ours.use.summary()["actual_ratio"] < 1 < exact.use.summary()["actual_ratio"]


def scored(logits, targets):
    return float(logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum())


@torch.inference_mode()
def over_cache(ids, split, context):
    """Log-likelihood of `ids[context:]`, where what lies before a border of `split` is read from the stored cache."""
    model = families.model("llama")
    cache = SpectrumCache(model.config, budget=0.3, recent_window=0)
    logits, start = [], 0
    for end in split:
        logits.append(model(torch.tensor([ids[start:end]]), **cache_argument(cache)).logits[0])
        start = end
    return scored(torch.cat(logits)[context - 1 : -1], torch.tensor(ids[context:]))


@pytest.mark.parametrize("batch", [1, 8])
def test_context_is_compressed_before_the_continuation(batch, tokenizer):
    """The choice's first token already is predicted over the stored context; rows of a batch do not mix."""
    ours = language_model(SpectrumLM, tokenizer, batch_size=batch, chunk=70, **COMPRESSED)
    requests = [(None, families.prompt(n, seed=n)[0].tolist(), families.prompt(m, seed=m)[0].tolist()) for n, m in
                ((150, 1), (150, 90), (203, 1), (203, 3))]  # fmt: skip
    got = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    for (value, _), (_, context, continuation) in zip(got, requests, strict=True):
        ids, n = context + continuation, len(context)
        expected = over_cache(ids, [n - 1, *range(n + 69, len(ids), 70), len(ids)], n)
        assert value == pytest.approx(expected, rel=1e-5)


def test_long_context_is_cut_from_the_left(tokenizer):
    ours = language_model(SpectrumLM, tokenizer, max_length=200, **COMPRESSED)
    ids = families.prompt(300)[0].tolist()
    (value, _) = ours._loglikelihood_tokens([(None, ids[:290], ids[290:])], disable_tqdm=True)[0]
    assert value == pytest.approx(over_cache(ids[-201:], [190, 201], 191), rel=1e-5)


def test_rolling_reads_what_came_before_its_chunk(tokenizer):
    ours = language_model(SpectrumLM, tokenizer, chunk=100, **COMPRESSED)
    ids = families.prompt(350)[0].tolist()
    (value, _) = ours._loglikelihood_tokens([(None, ids[:1], ids[1:])], disable_tqdm=True)[0]
    assert value == pytest.approx(over_cache(ids, [100, 200, 300, 350], 1), rel=1e-5)
    assert ours.use.summary()["unread"] == 0


def test_generation_is_generate_on_a_cache(tokenizer):
    """Left-padded rows, as `generate()` has them on a cache that the caller made."""
    ours = language_model(SpectrumLM, tokenizer, batch_size=2, **COMPRESSED)
    ids, mask = families.left_padded([203, 170])
    got = ours._model_generate(ids, 230, ["w1 w1 w1"], attention_mask=mask)
    cache = SpectrumCache(ours.model.config, budget=0.3, recent_window=0)
    expected = ours.model.generate(ids, attention_mask=mask, max_length=230, **cache_argument(cache), do_sample=False)
    assert torch.equal(got, expected)


class Watching(Method):
    """Notes what runs inside `prefilling`; its caches can lose count of their tokens."""

    inside = False

    def __init__(self, lost=0):
        super().__init__("watching")
        self.seen, self.lost = [], lost

    def cache(self, model):
        cache = DynamicCache(config=model.config)
        count = cache.get_seq_length
        cache.get_seq_length = lambda layer_idx=0: max(count(layer_idx) - self.lost, 0)
        return cache

    @contextmanager
    def prefilling(self, model):
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: self.seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        yield
        hook.remove()


def test_methods_watch_the_prefill_only(tokenizer):
    ours = language_model(SpectrumLM, tokenizer, chunk=20)
    ours.method = Watching()
    ids = families.prompt(90)[0].tolist()
    ours._loglikelihood_tokens([(None, ids[:50], ids[50:])], disable_tqdm=True)
    assert ours.method.seen == [49]
    ours._loglikelihood_tokens([(None, ids[:1], ids[1:])], disable_tqdm=True)
    assert ours.method.seen == [49, 20]


def test_pruned_caches_do_not_generate(tokenizer):
    ours = language_model(SpectrumLM, tokenizer)
    ours.method = Watching(lost=1)
    with pytest.raises(ValueError, match=r"'watching' prunes: its cache counts 32 of 33 tokens"):
        ours._model_generate(families.prompt(30), 34, ["w1"], attention_mask=torch.ones(1, 30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "nonsense"}, "unknown method 'nonsense'"),
        ({"policy": "sink_protect:0.1"}, "budgets from 0.25"),
        ({"chunk": 0}, "chunk is a number of tokens, 1 or more, got 0"),
        ({"batch_size": "auto:4"}, "batch_size is a number"),
    ],
)
def test_bad_arguments(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        language_model(SpectrumLM, tokenizer, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    families.model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def command(*arguments):
    cli.main(["lm-eval", *map(str, arguments)])


def test_command(saved, folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "results.json"
    arguments = ("--model", saved, "--tasks", "choice", "--include-path", folder, "--limit", 2, "--output", output)
    arguments += ("--recent-window", 0, "--device", "cpu", "--policy", "exact", "sink_protect:0.3")
    command(*arguments)
    shown = capsys.readouterr().out
    held = json.loads(output.read_text())
    assert {"torch", "transformers", "lm-eval", "device", "dtype"} <= held["environment"].keys()
    assert held["settings"]["limit"] == 2
    exact, compressed = (held["cells"][f"choice {spec}"] for spec in ("exact", "sink_protect:0.3"))
    assert exact["samples"] == compressed["samples"] == {"choice": 2}
    assert compressed["cache"]["actual_ratio"] < 1 < exact["cache"]["actual_ratio"]
    assert f"{compressed['cache']['actual_ratio']:.3f}" in shown
    assert "warning" not in shown
    monkeypatch.setattr("spectrumkv_hf.commands.lm_eval.evaluate", lambda *a: pytest.fail("measured again"))
    command(*arguments)
    assert capsys.readouterr().out == shown


def test_command_says_when_nothing_was_compressed(saved, folder, capsys):
    command("--model", saved, "--tasks", "short", "--include-path", folder, "--policy", "sink_protect:0.3")
    assert "warning: short with sink_protect:0.3: no token was read from a compressed cache" in capsys.readouterr().out


def test_command_says_when_prompts_were_cut(saved, folder, tmp_path, capsys):
    """Of generation and of scored choices; not of rolling texts, whose windows are made to fit."""
    output = tmp_path / "results.json"
    command("--model", saved, "--tasks", "generation", "choice", "rolling", "--include-path", folder, "--policy",
            "exact", "--max-length", 180, "--output", output)  # fmt: skip
    shown = capsys.readouterr().out
    cells = json.loads(output.read_text())["cells"]
    assert cells["generation exact"]["cache"]["cut"] == 2  # 160, 203 and 140 tokens, and 24 to generate
    assert cells["choice exact"]["cache"]["cut"] == 4  # the four choices of the context with 203
    assert cells["rolling exact"]["cache"]["cut"] == 0
    last = shown.splitlines()[-2:]
    assert last[0].startswith("warning: generation with exact: 2 prompts were longer than --max-length (180)")
    assert last[1].startswith("warning: choice with exact: 4 prompts were longer")


@pytest.mark.parametrize("batch", [1, 3])
def test_cut_prompts_are_lm_evals(batch, tokenizer, folder):
    """What is left of them is what stock `hf` leaves."""
    limits = {"max_length": 180, "batch_size": batch}
    stock, _ = responses(language_model(HFLM, tokenizer, **limits), folder, "generation")
    ours = language_model(SpectrumLM, tokenizer, policy="exact", **limits)
    assert responses(ours, folder, "generation")[0] == stock
    assert ours.use.cut == 2


def test_few_needles_are_at_many_depths():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from datasets_from_text import needles
    finally:
        sys.path.remove(str(EXAMPLES))
    rows = needles(sentences=20)["test"]
    places = [(row["answer"], row["depth"]) for row in rows]
    assert len(places) == len({*places}) == 25
    assert len({answer for answer, _ in places[:5]}) == len({depth for _, depth in places[:5]}) == 5
    assert all(row["answer"] in row["context"] for row in rows)


def test_example_tasks(saved, tmp_path, capsys):
    article = tmp_path / "wiki.txt"
    article.write_text(" = One = \n\n w5 w6 w7 \n = = Part = = \n w8 \n = Two = \n\n w9 w9 w9 \n")
    metadata = json.dumps({"text_file": str(article), "sentences": 6, "depths": [0.5]})
    output = tmp_path / "results.json"
    command("--model", saved, "--tasks", "wikitext_file", "needle", "--include-path", EXAMPLES, "--policy", "exact",
            "--metadata", metadata, "--limit", 3, "--output", output)  # fmt: skip
    cells = json.loads(output.read_text())["cells"]
    assert cells["wikitext_file exact"]["samples"] == {"wikitext_file": 2}
    assert cells["wikitext_file exact"]["metrics"]["wikitext_file"]["word_perplexity,none"] > 1
    assert cells["needle exact"]["metrics"]["needle"]["found,none"] == 0


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as problem:
        command(*arguments)
    assert problem.value.code == 2
    return capsys.readouterr().err


def test_command_errors(saved, folder, capsys, monkeypatch, tmp_path):
    known = ("--model", saved, "--include-path", folder, "--tasks")
    assert "unknown method 'nonsense'" in refused(capsys, *known, "choice", "--policy", "nonsense")
    assert "there is no folder" in refused(capsys, "--tasks", "choice", "--include-path", tmp_path / "nowhere")
    assert "error: cannot write" in refused(capsys, *known, "choice", "--output", tmp_path / "no" / "x.json")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install -c constraints.txt '.[lm-eval]'" in refused(capsys, *known, "choice")


@pytest.mark.slow
def test_own_command_line_of_lm_eval(saved, folder, tmp_path):
    """Reads the whole collection of tasks, which takes its time; an unknown task is reported by our command too."""
    arguments = [
        sys.executable,
        "-m",
        "spectrumkv_hf.evaluation.subjects.lm_eval_model",
        "run",
        "--model",
        "spectrumkv",
    ]
    arguments += ["--model_args", f"pretrained={saved},policy=sink_protect:0.3,recent_window=0", "--device", "cpu"]
    arguments += ["--tasks", "choice", "--include_path", folder, "--limit", "1", "--output_path", tmp_path]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "|choice|" in result.stdout
    with pytest.raises(ValueError, match="no task nonsense in lm-eval or"):
        task_manager(["choice", "nonsense"], folder, None)


OWN = Path(lm_eval.__file__).parent / "tasks"
"""lm-eval's own collection, a folder of which is read much faster than all of it."""


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def hub(request, tmp_path_factory):
    """Data sets in the hub's layout under their names: a card whose head says where the rows of each config lie."""
    folder, rng = tmp_path_factory.mktemp("hub"), random.Random(6)

    def data_set(name, split, configs):
        card = []
        for config, rows in configs.items():
            path = f"{config}/{split}-00000-of-00001.{request.param}"
            (folder / name / config).mkdir(parents=True)
            if request.param == "parquet":
                Dataset.from_list(rows).to_parquet(folder / name / path)
            else:
                (folder / name / path).write_text("\n".join(map(json.dumps, rows)))
            card.append({"config_name": config, "data_files": [{"split": split, "path": path}]})
        (folder / name / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n# A card\n")

    def rows(count):
        return [
            {"context": text(120, rng), "question": text(5, rng), "answers": ["w7 w8"], "length": 120,
             "dataset": "made up", "language": "en", "all_classes": None, "_id": str(index)}
            for index in range(count)
        ]  # fmt: skip

    data_set("Xnhyacinth/LongBench", "test", {"2wikimqa_e": rows(3), "lcc_e": rows(2), "repobench-p_e": rows(1)})
    essays = [{"text": " ".join(f"{text(9, rng)}." for _ in range(40))} for _ in range(2)]
    data_set("baber/paul_graham_essays", "train", {"default": essays})
    return folder


def rows_of(folder, name, config):
    (path,) = (folder / name / config).iterdir()
    return (Dataset.from_parquet if path.suffix == ".parquet" else Dataset.from_json)(str(path))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Whoever asks the hub for a data set fails, and says for which; what is read from a folder is not kept."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)


def needs(*modules):
    for module in modules:
        pytest.importorskip(module, reason="of lm-eval's extras longbench and ruler")


def test_longbench_from_a_folder(saved, hub, offline, tmp_path, capsys):
    """A task, and a group of two."""
    needs("jieba", "fuzzywuzzy", "rouge")
    output = tmp_path / "results.json"
    arguments = ("--include-path", OWN / "longbench", "--data-dir", hub, "--recent-window", 0, "--output", output)
    command("--model", saved, "--tasks", "longbench_2wikimqa_e", "longbench_code_e", "--policy", "exact",
            "sink_protect:0.3", *arguments)  # fmt: skip
    cells = json.loads(output.read_text())["cells"]
    code = {"longbench_lcc_e": 2, "longbench_repobench-p_e": 1}
    samples = {"longbench_2wikimqa_e": {"longbench_2wikimqa_e": 3}, "longbench_code_e": code}
    for task, count in samples.items():
        for spec in ("exact", "sink_protect:0.3"):
            cell = cells[f"{task} {spec}"]
            assert cell["samples"] == count and {*cell["metrics"]} == {task, *count}
            assert all(0 <= metrics["score,none"] <= 1 for metrics in cell["metrics"].values())
            assert (cell["cache"]["nominal_ratio"] < 0.7) == (spec != "exact")
    assert "warning" not in capsys.readouterr().out


def test_longbench_prompts_hold_the_folders_rows(hub, offline):
    needs("jieba", "fuzzywuzzy", "rouge")
    tasks = task_manager(["longbench_2wikimqa_e"], OWN / "longbench", None)
    (task,) = load_task(tasks, "longbench_2wikimqa_e", hub)
    for doc, row in zip(task.test_docs(), rows_of(hub, "Xnhyacinth/LongBench", "2wikimqa_e"), strict=True):
        assert row["context"] in task.doc_to_text(doc) and row["question"] in task.doc_to_text(doc)
        assert task.process_results(doc, [" w7 w8"])["score"] == 1 > task.process_results(doc, ["w9"])["score"]


def test_data_sets_come_from_the_hub_by_name(saved, tmp_path, monkeypatch, capsys):
    """Also where there is a folder, which lacks them."""
    needs("jieba", "fuzzywuzzy", "rouge")
    asked = []

    def load_dataset(path, name=None, **_):
        asked.append((path, name))
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for more in ((), ("--data-dir", tmp_path)):
        error = refused(capsys, "--model", saved, "--tasks", "longbench_2wikimqa_e", "--include-path",
                        OWN / "longbench", *more)  # fmt: skip
        assert "Couldn't reach 'Xnhyacinth/LongBench' on the Hub" in error
    assert asked == [("Xnhyacinth/LongBench", "2wikimqa_e")] * 2


NO_DOWNLOAD = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")


@pytest.mark.parametrize("name", NO_DOWNLOAD)
def test_ruler_without_a_download(name, saved, offline, tmp_path, capsys, monkeypatch):
    """Documents are made up to length by the model's own tokenizer, once for all methods."""
    needs("wonderwords")
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **_: pytest.fail(f"asked for {a}"))
    monkeypatch.setattr("requests.get", lambda *a, **_: pytest.fail(f"asked for {a}"))
    load, made = lm_eval_command.load_task, []
    monkeypatch.setattr(lm_eval_command, "load_task", lambda *a: made.append(load(*a)) or made[-1])
    output = tmp_path / "results.json"
    command("--model", saved, "--tasks", name, "--include-path", OWN / "ruler", "--metadata",
            '{"max_seq_lengths": [950]}', "--limit", 2, "--policy", "exact", "uniform_int4", "--recent-window", 0,
            "--output", output)  # fmt: skip
    ((task,),) = made
    docs = task.test_docs()
    assert len(docs) == 500 and {*docs["max_length"]} == {950} and 600 < max(docs["length"]) <= 950 + 50
    for spec in ("exact", "uniform_int4"):
        cell = json.loads(output.read_text())["cells"][f"{name} {spec}"]
        assert cell["samples"] == {name: 2} and 0 <= cell["metrics"][name]["950,none"] <= 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    assert [row[1:3] for row in rows] == [["950", "exact"], ["950", "uniform_int4"]]  # no row of -1 for 4096 tokens


@pytest.mark.parametrize("hub", ["jsonl"], indirect=True)
@pytest.mark.parametrize("name", ESSAYS)
def test_ruler_over_essays_in_a_folder(name, hub, saved, offline, monkeypatch):
    needs("wonderwords")
    from lm_eval.tasks.ruler import prepare_niah

    monkeypatch.setattr(prepare_niah, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))  # nltk's needs a file
    prepare_niah.get_haystack.cache_clear()
    tasks = task_manager([name], OWN / "ruler", {"tokenizer": str(saved), "max_seq_lengths": [950]})
    try:
        (task,) = load_task(tasks, name, hub)
    finally:
        prepare_niah.get_haystack.cache_clear()
    doc = task.test_docs()[0]
    essay = rows_of(hub, "baber/paul_graham_essays", "default")[0]["text"]
    assert essay.split(".")[0] in doc["input"] and all(answer in doc["input"] for answer in doc["outputs"])


def test_longer_answers(saved, folder, tmp_path, monkeypatch):
    lengths = []
    generate = SpectrumLM._model_generate

    def watched(self, context, *args, **kwargs):
        ids = generate(self, context, *args, **kwargs)
        lengths.append(ids.shape[1] - context.shape[1])
        return ids

    monkeypatch.setattr(SpectrumLM, "_model_generate", watched)
    arguments = ("--model", saved, "--tasks", "generation", "--include-path", folder, "--policy", "exact",
                 "uniform_int4", "--output", tmp_path / "results.json")  # fmt: skip
    command(*arguments, "--max-gen-toks", 7)
    assert max(lengths) == 7 and len(lengths) == 6
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["max_gen_toks"] == 7
    with pytest.raises(SystemExit):
        command(*arguments)  # results of other lengths are not mixed
