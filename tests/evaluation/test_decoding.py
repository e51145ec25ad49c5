"""Long greedy runs over a compressed prompt: against `generate()` and against the model's own numbers."""

import functools
import json

import pytest
import redraw_figures
import tiny
import torch
from families import model, prompt
from transformers import DynamicCache

from spectrumkv_hf import cache_argument
from spectrumkv_hf.commands.main import main
from spectrumkv_hf.evaluation.protocols.decoding import Decoder, departures, exact_run, repeated, summarised
from spectrumkv_hf.evaluation.subjects.methods import parse_method

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

TOKENS, BUCKET = 128, 32
PROMPTS = torch.cat([prompt(200, seed=seed) for seed in (1, 2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"))


@functools.cache
def exact_run_of_llama():
    return exact_run(model("llama"), PROMPTS, TOKENS)


def generated(built, cache, ids, **options):
    """What `generate()` says where all of the prompt but its last token is in the cache."""
    with torch.no_grad():
        built(ids[:, :-1], **cache_argument(cache))
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": TOKENS, **options}
        return built.generate(ids, **given, **cache_argument(cache))[:, ids.shape[1] :]


def test_the_exact_run_is_that_of_generate():
    llama = model("llama")
    run = exact_run(llama, PROMPTS, TOKENS)
    assert torch.equal(run.ids, generated(llama, DynamicCache(config=llama.config), PROMPTS))
    with torch.no_grad():
        logits = llama(torch.cat((PROMPTS, run.ids), 1), use_cache=False).logits[:, PROMPTS.shape[1] - 1 : -1]
    torch.testing.assert_close(run.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["uniform_int4", "kivi:2:32:32"])
def test_departures_against_generate_and_the_definition(spec):
    llama, method = model("llama", head_dim=32), parse_method(spec, recent_window=0)
    exact = exact_run(llama, PROMPTS, TOKENS)
    rows, prefilled, final = departures(llama, PROMPTS, method, exact, BUCKET)

    free = generated(llama, method.cache(llama), PROMPTS)
    cache = method.cache(llama)
    logits = []
    with torch.no_grad():
        llama(PROMPTS[:, :-1], **cache_argument(cache))
        assert method.memory(cache) == prefilled
        for ids in torch.cat((PROMPTS[:, -1:], exact.ids[:, :-1]), 1).split(1, dim=1):
            logits.append(llama(ids, **cache_argument(cache)).logits[:, 0])
    assert method.memory(cache) == final and prefilled.stored < final.stored
    p, q = exact.logits.double().log_softmax(-1), torch.stack(logits, 1).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).unflatten(1, (-1, BUCKET)).mean(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double()
    for index, row in enumerate(rows):
        equal = (free[index] == exact.ids[index]).tolist()
        assert row.first == equal.index(False) and row.same == pytest.approx(sum(equal) / TOKENS)
        assert row.kl == pytest.approx(kl[index].tolist(), rel=1e-3) and min(row.kl) > 1e-5
        assert row.agreement == pytest.approx(agreement[index].unflatten(0, (-1, BUCKET)).mean(-1).tolist())
        assert row.first == agreement[index].tolist().index(0)  # up to there both runs are given the same tokens
        assert row.repeated == repeated(free[index].tolist())


@pytest.mark.parametrize(
    ("spec", "rel"),
    [
        ("uniform_int4::spectrum", 1e-3),
        ("uniform_int4", 1e-2),
    ],  # a code may fall on the other side, by the order of sums
)
def test_rows_of_a_batch_do_not_mix(spec, rel):
    llama, method = model("llama"), parse_method(spec, recent_window=0)
    together, _, _ = departures(llama, PROMPTS, method, exact_run_of_llama(), BUCKET)
    for ids, row in zip(PROMPTS.split(1), together, strict=True):
        (alone,), _, _ = departures(llama, ids, method, exact_run(llama, ids, TOKENS), BUCKET)
        assert (alone.first, alone.same, alone.agreement) == (row.first, row.same, row.agreement)
        assert alone.kl == pytest.approx(row.kl, rel=rel)


@pytest.mark.parametrize("spec", ["exact", "fp16"])
def test_what_loses_nothing_departs_nowhere(spec):
    llama = model("llama")
    rows, _, _ = departures(llama, PROMPTS, parse_method(spec), exact_run_of_llama(), BUCKET)
    for row in rows:
        assert row.first is None and row.same == 1 and row.agreement == [1] * 4
        assert row.kl == pytest.approx([0] * 4, abs=1e-6)


def test_a_run_that_is_not_forced_stays_its_own():
    """Without the context it says something else, and given the exact run's tokens it is nearer than by its own."""
    llama, method = model("llama"), parse_method("drop_window:0.1", recent_window=0)
    exact = exact_run_of_llama()
    rows, _, _ = departures(llama, PROMPTS, method, exact, BUCKET)
    assert all(row.same < 0.5 for row in rows)
    assert all(sum(row.agreement) / len(row.agreement) > row.same for row in rows)


@pytest.mark.parametrize("several", [False, True])
def test_no_run_ends_early(several):
    llama = model("llama")
    often = exact_run_of_llama().ids.flatten().bincount().topk(2).indices.tolist()
    llama.generation_config.eos_token_id = ends = often if several else often[0]
    run = exact_run(llama, PROMPTS, TOKENS)
    assert not torch.isin(run.ids, torch.tensor(ends)).any()
    expected = generated(llama, DynamicCache(config=llama.config), PROMPTS, min_new_tokens=TOKENS)
    assert torch.equal(run.ids, expected)
    row = departures(llama, PROMPTS, parse_method("uniform_int4", 0), run, BUCKET)[0][0]
    assert all(0 < kl < 1 for kl in row.kl)  # what neither can say makes no difference


def test_the_watch_is_over_after_the_prefill():
    llama, method = model("llama"), parse_method("exact")
    seen = []

    class Watched:
        def __enter__(self):
            seen.append("prefill")

        def __exit__(self, *_):
            seen.append("over")

    method.prefilling = lambda _: Watched()
    Decoder(llama, method, PROMPTS)
    assert seen == ["prefill", "over"]


def test_repeated():
    assert repeated([1, 2, 1, 2, 1, 2], 2) == 3 / 6  # the third to the fifth pair
    assert repeated(range(50)) == 0
    assert repeated([7] * 108) == 100 / 108
    assert repeated([1, 2, 3]) == 0  # too short for one


def test_buckets_are_whole():
    llama = model("llama")
    exact = exact_run(llama, PROMPTS, 10)
    with pytest.raises(ValueError, match="10 tokens are no whole number of buckets of 4"):
        departures(llama, PROMPTS, parse_method("exact"), exact, 4)


def test_summary_is_that_of_the_modules():
    llama, method = model("llama"), parse_method("uniform_int4", recent_window=0)
    rows, prefilled, final = departures(llama, PROMPTS, method, exact_run_of_llama(), BUCKET)
    got = summarised(rows, [prefilled.actual_ratio], [final.actual_ratio])
    kl = torch.tensor([row.kl for row in rows], dtype=torch.float64)
    assert got["kv_divergence"]["kl"] == pytest.approx(float(kl.mean())) and got["kv_divergence"]["windows"] == 2
    assert got["kv_divergence"]["kl_error"] == pytest.approx(float(kl.mean(1).std() / 2**0.5))
    assert [bucket["kl"] for bucket in got["buckets"]] == pytest.approx(kl.mean(0).tolist())
    assert (
        got["kv_memory"]["ratio"] == prefilled.actual_ratio and got["kv_memory_at_end"]["ratio"] == final.actual_ratio
    )
    assert got["first"] == [row.first for row in rows]


def command(folder, output, *arguments):
    settings = ["--model", folder, "--dataset", "passage", "--contexts", "200", "300", "--tokens", "96", "--bucket"]
    main(["eval", "generation", *settings, "32", "--windows", "3", *arguments, "--output", str(output)])
    return json.loads((output / "generation.json").read_text())


def test_the_command(folder, tmp_path, capsys):
    held = command(folder, tmp_path, "--batch", "2", "--methods", "uniform_int4")
    assert {*held["cells"]} == {f"{context} | {spec}" for context in (200, 300) for spec in ("exact", "uniform_int4")}
    for cell in held["cells"].values():
        assert len(cell["prompts"]) == 3 and len(cell["actual_ratio"]) == 2  # a batch of two and one of one
    header = held["table"]["header"]
    rows = [dict(zip(header, row, strict=True)) for row in held["table"]["rows"]]
    assert header[-3:] == ["first 32", "last 32", "top-1 %"] and len(rows) == 4
    for row in rows:
        cell = held["cells"][f"{row['prompt']} | {row['method']}"]
        firsts = sorted(96 if each["first"] is None else each["first"] for each in cell["prompts"])
        assert row["first different"] == ("none" if firsts[1] == 96 else str(firsts[1]))
        assert row["equal runs"] == f"{firsts.count(96)}/3"
        same = sum(each["same"] for each in cell["prompts"]) / 3
        assert row["same %"] == f"{100 * same:.1f}"
        assert row["last 32"] == f"{sum(each['kl'][-1] for each in cell['prompts']) / 3:.5f}"
    assert rows[0]["equal runs"] == "3/3" and float(rows[1]["KL (nats)"]) > 0 == float(rows[0]["KL (nats)"])
    assert (tmp_path / "generation.png").read_bytes().startswith(b"\x89PNG")
    again = command(folder, tmp_path, "--batch", "2", "--methods", "uniform_int4", "uniform_int8")
    assert {key: again["cells"][key] for key in held["cells"]} == held["cells"] and len(again["cells"]) == 6
    assert "Long greedy generation" in capsys.readouterr().out
    experiment = redraw_figures.experiment_of(tmp_path / "generation.json")
    redrawn = redraw_figures.stored(experiment, tmp_path / "generation.json")
    assert redrawn.args.contexts == [200, 300] and redrawn.args.methods == ["exact", "uniform_int4", "uniform_int8"]
    experiment.figure(redrawn).draw_without_rendering()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "100"], "--tokens 100 is no multiple of --bucket 32"),
        (["--contexts", "1"], "--contexts are 2 or more"),
        (["--batch", "0"], "--batch 1 or more"),
        (["--methods", "nonsense"], "unknown method 'nonsense'"),
    ],
)
def test_bad_arguments_are_refused(folder, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(folder, tmp_path, *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
