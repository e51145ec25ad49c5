"""Tasks after RULER: the prompts hold what is asked for, and nothing else that would be right."""

import json
import re
from collections import Counter

import pytest
import tiny
import torch
from tiny import TEMPLATE, tokenizer

from spectrumkv_hf.commands.main import main
from spectrumkv_hf.evaluation.protocols.ruler import COMMON, DISTRACTORS, HOPS, TASKS, VALUES, ruler_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"))


def text_of(words, prompt):
    return "".join(words.convert_ids_to_tokens(prompt.prompts.ids[0]))


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("name", TASKS)
def test_prompts(name, template):
    words = tokenizer(template)
    prompt = ruler_prompt(words, name, 3000, seed=3)
    assert prompt.prompts.ids.shape == (1, 3000)
    text = text_of(words, prompt)
    context, end = text[: -prompt.prompts.question], text[-prompt.prompts.question :]
    assert all(answer in context for answer in prompt.answers)
    assert not any(answer in end for answer in prompt.answers)
    assert len(set(prompt.answers)) == len(prompt.answers)
    assert text.startswith("<user>") == ("<assistant>" in end) == (template is not None)
    again = ruler_prompt(words, name, 3000, seed=3)
    assert torch.equal(again.prompts.ids, prompt.prompts.ids) and again.answers == prompt.answers
    assert ruler_prompt(words, name, 3000, seed=4).answers != prompt.answers


@pytest.mark.parametrize(("name", "values", "keys"), [("single", 1, 1), ("multikey", 1, 9), ("multivalue", VALUES, 1)])
def test_numbers_are_hidden_once_each(name, values, keys):
    words = tokenizer()
    prompt = ruler_prompt(words, name, 4000, seed=0)
    text = text_of(words, prompt)
    said = re.findall(r"One of the magic numbers of (\S+) is (\d+)\.", text)
    assert len(said) == keys - 1 + values == len(set(said)) and DISTRACTORS == 8
    asked = text[text.rindex("Question:") :]
    (key,) = {name for name, _ in said if name in asked}
    assert {number for name, number in said if name == key} == {*prompt.answers}
    borders = [match.start() for match in re.finditer("One of the magic", text)]
    assert max(borders) - min(borders) > 1000 or keys == values == 1  # all over the text


def test_variables_form_a_chain():
    words = tokenizer()
    prompt = ruler_prompt(words, "variables", 2000, seed=1)
    text = text_of(words, prompt)
    said = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
    assert len(said) == HOPS + 1
    values = {}
    for name, value in said:  # each is assigned behind the one that it takes its value from
        values[name] = values.get(value, value)
    assert {*values} == {*prompt.answers} and len({*values.values()}) == 1
    assert next(iter(values.values())) in text[-prompt.prompts.question :]


@pytest.mark.parametrize(("name", "pattern"), [("common-words", r"\d+\. ([a-z ]+)"), ("frequent-words", r" ([a-z]+)")])
@pytest.mark.parametrize("tokens", [1500, 6000])
def test_what_is_asked_for_comes_most_often(name, pattern, tokens):
    words = tokenizer()
    prompt = ruler_prompt(words, name, tokens, seed=2)
    text = text_of(words, prompt)[: -prompt.prompts.question]
    text = text[text.index(" 1. " if name == "common-words" else "word comes.") :].removeprefix("word comes.")
    counts = Counter(word.strip() for word in re.findall(pattern, text))
    first = counts.most_common(len(prompt.answers) + 1)
    assert {word for word, _ in first[:-1]} == {*prompt.answers}
    assert first[-2][1] > first[-1][1]
    assert len(prompt.answers) == (COMMON if name == "common-words" else 3)


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="tasks are single, .* got 'essay'"):
        ruler_prompt(tokenizer(), "essay", 1000, 0)
    with pytest.raises(ValueError, match="300 tokens has no room for a context beside what task 'single' needs"):
        ruler_prompt(tokenizer(), "single", 300, 0)


def test_the_command(folder, tmp_path, capsys):
    settings = ["--model", folder, "--reduced", "--lengths", "900", "--output", str(tmp_path)]
    main(["eval", "ruler", *settings])
    shown = capsys.readouterr().out
    held = json.loads((tmp_path / "ruler.json").read_text())
    assert len(held["cells"]) == 4
    header, rows = held["table"]["header"], held["table"]["rows"]
    assert header == ["method", "tokens", "actual", "single", "variables", "mean"] and len(rows) == 2
    for row in held["metrics"]:
        cells = [c for key, c in held["cells"].items() if key.startswith(f"{row['method']} | {row['task']} |")]
        said = [answer.lower() in cell["text"].lower() for cell in cells for answer in cell["answers"]]
        assert row["needle_recall"] == {"recall": sum(said) / len(said), "found": sum(said), "total": len(said)}
    assert "sink_protect:0.3" in shown
    with pytest.raises(SystemExit):
        main(["eval", "ruler", *settings, "--samples", "0"])
    assert "--samples and --lengths are 1 or more" in capsys.readouterr().err
