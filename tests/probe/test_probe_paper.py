"""The paper's probe: its cache, its three trials, its first token."""

from types import SimpleNamespace

import pytest
import torch
from families import model
from transformers import DynamicCache

from spectrumkv_hf.policy import get_policy
from spectrumkv_hf.probe import PaperProbe, PaperVerdict, ProbeError, Trial, needles, paper
from spectrumkv_hf.probe.needles import HAYSTACK, NEEDLES, ask, needle_prompts
from spectrumkv_hf.tiered.cache import TieredCache

LETTERS = "".join(sorted({*"".join(HAYSTACK), *"".join("".join(needle) for needle in NEEDLES), *"\n:QuestionAnswer"}))


GREEDY = get_policy("greedy", 0.3, importance="positional", scope="token", recent_window=0, sinks=4)
"""As the paper's released code has it."""


class Characters:
    """A tokenizer of characters."""

    chat_template = None

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[LETTERS.index(character) + 3 for character in text])

    def batch_decode(self, ids, **_):
        return ["".join(LETTERS[i - 3] if 3 <= i < len(LETTERS) + 3 else "?" for i in row) for row in ids.tolist()]


def test_the_first_token_is_exact_and_the_others_read_the_tiers(monkeypatch):
    m, tokenizer = model("llama", "sdpa"), Characters()
    prompts = needle_prompts(tokenizer, NEEDLES[0], [0.5], 400)
    calls = []
    stock = needles.logits_over

    def watched(m, ids, cache, start, last):
        logits = stock(m, ids, cache, start, last)
        calls.append((start, ids.shape[1], logits))
        return logits

    def cache():
        return TieredCache(m.config, policy=GREEDY, codec="absmax")

    monkeypatch.setattr(needles, "logits_over", watched)
    ask(m, tokenizer, cache(), prompts, max_new_tokens=4, first_exact=True)
    assert [call[:2] for call in calls] == [(0, 400), (400, 1), (401, 1), (402, 1)]
    with torch.no_grad():
        exact = m(prompts.ids).logits[:, -1]
    assert torch.allclose(calls[0][2][:, -1], exact, atol=1e-4)
    calls.clear()
    ask(m, tokenizer, cache(), prompts, max_new_tokens=4)
    assert [call[:2] for call in calls] == [(0, 399), (399, 1), (400, 1), (401, 1), (402, 1)][: len(calls)]
    assert len(calls) == 5


def test_trials_and_cache_are_the_papers(monkeypatch):
    seen = []

    def answered(m, tokenizer, cache, prompts, **kwargs):
        assert kwargs == {"first_exact": True}
        seen.append((cache, prompts))
        return [prompts.answer if type(cache) is DynamicCache or len(seen) < 5 else "nothing"]

    monkeypatch.setattr(paper, "ask", answered)
    m, tokenizer = model("llama", "sdpa"), Characters()
    probe = PaperProbe(tokens=500)
    ids = probe.inputs(m, tokenizer)
    found = probe.measure(m, tokenizer, ids)
    assert found.trials == tuple(
        Trial(answer=needle.answer, depth=depth, exact=True, tiered=tiered)
        for needle, depth, tiered in zip(NEEDLES, (0.25, 0.5, 0.75), (True, True, False), strict=False)
    )
    assert found.passed and found.conclusive
    assert ids.shape == (3, 500)
    for row, needle, depth in zip(ids, NEEDLES, (0.25, 0.5, 0.75), strict=False):
        at = tokenizer.batch_decode(row[None])[0].index(needle.sentence)
        assert abs(at / 440 - depth) < 0.1
    assert [type(cache) for cache, _ in seen] == [DynamicCache, TieredCache] * 3
    for cache, prompts in seen:
        assert prompts.ids.shape == (1, 500)
        if isinstance(cache, TieredCache):
            assert cache.policy == GREEDY and cache.codec.name == "absmax"


@pytest.mark.parametrize(
    ("exact", "tiered", "passed", "conclusive"),
    [("111", "111", 1, 1), ("111", "011", 1, 1), ("011", "001", 0, 1), ("001", "001", 0, 0), ("000", "110", 1, 0)],
)
def test_two_of_three(exact, tiered, passed, conclusive):
    trials = tuple(
        Trial(answer="a", depth=0.5, exact=e == "1", tiered=t == "1") for e, t in zip(exact, tiered, strict=True)
    )
    found = PaperVerdict(codec="absmax", tokens=4096, trials=trials, seconds=0.0)
    assert (found.passed, found.conclusive) == (passed, conclusive)
    policy = found.policy(0.3, sinks=2)
    assert policy.name == "adaptive" and policy.probe_passed is bool(passed) and policy.sinks == 2


def test_a_real_run():
    """A random model finds nothing, over any cache: the probe must not blame the tiers."""
    m, tokenizer = model("llama", "sdpa"), Characters()
    probe = PaperProbe(tokens=300)
    found = probe.measure(m, tokenizer, probe.inputs(m, tokenizer))
    assert not found.passed and not found.conclusive and len(found.trials) == 3


@pytest.mark.parametrize(
    ("tokens", "message"), [(2000, "the model takes 1024 tokens, the prompts of the probe have 2000"), (40, "no room")]
)
def test_prompts_that_do_not_fit(tokens, message):
    with pytest.raises(ProbeError, match=message):
        PaperProbe(tokens=tokens).inputs(model("llama", "sdpa"), Characters())


def test_bad_settings():
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        PaperProbe(codec="zip")
    with pytest.raises(ValueError, match="tokens is a number of tokens, 1 or more, got 0"):
        PaperProbe(tokens=0)
