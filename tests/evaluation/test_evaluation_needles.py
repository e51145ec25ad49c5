"""Needle prompts, and answers over a cache."""

import pytest
import torch
from families import model
from tiny import TEMPLATE, tokenizer
from transformers import DynamicCache

from spectrumkv_hf import cache_argument
from spectrumkv_hf.evaluation.protocols.needles import DEPTHS, ask_over
from spectrumkv_hf.evaluation.subjects.methods import parse_method
from spectrumkv_hf.probe.needles import NEEDLES, found, needle_prompts

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("needle", NEEDLES, ids=lambda needle: needle.answer)
def test_prompts(template, needle):
    words = tokenizer(template)
    prompts = needle_prompts(words, needle, DEPTHS, 700)
    assert prompts.ids.shape == (len(DEPTHS), 700)
    assert prompts.answer == needle.answer and needle.answer in needle.sentence
    texts = ["".join(words.convert_ids_to_tokens(row)) for row in prompts.ids]
    places = [text.index(needle.sentence) for text in texts]
    assert places == sorted(places) and len(set(places)) > 5
    room = 700 - prompts.question - len(needle.sentence)
    for text, place, depth in zip(texts, places, DEPTHS, strict=True):
        assert text.count(needle.answer) == 1
        assert abs(place - depth * room) < 35  # a sentence has up to 50 tokens
        question = text[-prompts.question :]
        assert needle.question in question and needle.sentence not in question
        assert text.startswith("<user>") == question.endswith("<assistant>") == (template is not None)
    assert len({text.replace(f" {needle.sentence}", "") for text in texts}) == 1  # they differ in the depth alone


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="depths are fractions"):
        needle_prompts(tokenizer(), NEEDLES[0], [0.5, 1.2], 700)
    with pytest.raises(ValueError, match="no room for a haystack"):
        needle_prompts(tokenizer(), NEEDLES[0], [0.5], 100)


@pytest.mark.parametrize("before", [True, False])
def test_answers_equal_generate(before):
    llama, words = model("llama"), tokenizer()
    prompts = needle_prompts(words, NEEDLES[0], [0.2, 0.8], 300)
    got = ask_over(llama, words, parse_method("exact"), prompts, 12, asked_before=before)
    with torch.no_grad():
        out = llama.generate(
            prompts.ids,
            attention_mask=torch.ones_like(prompts.ids),
            **cache_argument(DynamicCache(config=llama.config)),
            max_new_tokens=12,
            do_sample=False,
        )
    assert got.texts == words.batch_decode(out[:, 300:], skip_special_tokens=True)
    assert len(set(got.texts)) == 2
    assert got.memory.nominal_ratio == 1


def test_the_question_sees_the_compressed_context():
    """Its bytes are those of the context alone, and dropping the context changes what is said."""
    llama, words = model("llama"), tokenizer()
    prompts = needle_prompts(words, NEEDLES[0], [0.2, 0.8], 400)
    method = parse_method("drop_window:0.1", recent_window=0)
    after = ask_over(llama, words, method, prompts, 12, asked_before=False)
    tokens = 400 - prompts.question
    assert after.memory.nominal_ratio == pytest.approx(int(0.1 * tokens) / tokens)
    assert after.texts != ask_over(llama, words, parse_method("exact"), prompts, 12).texts


def test_the_answer_is_found_in_whatever_case():
    assert found(["It is unicorn7!", "UNICORN"], "UNICORN7") == [True, False]
