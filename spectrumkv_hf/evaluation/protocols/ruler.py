"""Retrieval, tracking and aggregation in long contexts, after RULER (Hsieh et al., arXiv 2404.06654), with no download.

The kinds of tasks, how their contexts are made and how answers are scored are RULER's; wording and word lists are ours,
so scores of the two must not be compared. What asks for the answer follows the context, and begins the answer.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from spectrumkv_hf.probe.needles import HAYSTACK, NeedlePrompts, around, filled

VALUES = 4
"""Numbers of one key, where there are several."""
DISTRACTORS = 8
"""Keys with a number each that nobody asks for."""
HOPS = 4
"""Variables of a chain behind the first."""
COMMON, TIMES = 10, 3
"""Words of a list that are common, and how often each comes in a stretch in which as many others come once each."""
FREQUENT = (40, 20, 12)
"""How often the words that are asked for come in each hundred of a coded text; the others come once each."""

ADJECTIVES = (
    *("amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lively"),
    *("mellow", "narrow", "olden", "pale", "quiet", "rusty", "silent", "tender", "upper", "vivid", "weary", "young"),
)
NOUNS = (
    *("anchor", "basket", "candle", "drawer", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle"),
    *("ladder", "mirror", "needle", "orchard", "pillow", "quarry", "ribbon", "saddle", "timber", "umbrella", "valley"),
    *("wagon", "yard", "arrow", "bottle", "cabin", "desert", "elbow", "forest", "glove", "harbor", "iron", "journal"),
    *("kitchen", "lantern", "meadow", "napkin", "oven", "pebble", "quilt", "river", "sailor", "tunnel", "vessel"),
)
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu")


class Task(NamedTuple):
    """One question about a long context.

    Attributes:
        before: What the reader is told before the context.
        pieces: The context, to be cut into tokens piece by piece.
        hidden: Further pieces, which go to random borders of the context, in this order.
        question: What is asked behind it.
        lead: How the answer begins.
        answers: All of what the answer has to hold.
        new_tokens: That it takes at most.
    """

    before: str
    pieces: Iterator[str]
    hidden: Sequence[str]
    question: str
    lead: str
    answers: tuple[str, ...]
    new_tokens: int


class RulerPrompt(NamedTuple):
    """A prompt of one task.

    Attributes:
        prompts: One row of ids, as the answers to needles take them.
        answers: All of what a right answer holds.
        new_tokens: That are to be decoded.
    """

    prompts: NeedlePrompts
    answers: tuple[str, ...]
    new_tokens: int


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10**6, 10**7))


def _keys(draw: random.Random, count: int) -> list[str]:
    every = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    return draw.sample(every, count)


def _hidden_numbers(draw: random.Random, keys: int, values: int) -> Task:
    """Numbers of `keys` keys in the haystack, `values` for the first one, which is asked for."""
    names = _keys(draw, keys)
    said = [(name, _number(draw)) for name in names for _ in range(values if name == names[0] else 1)]
    answers = tuple(number for name, number in said if name == names[0])
    draw.shuffle(said)
    many = "all magic numbers" if values > 1 else "the magic number"
    return Task(
        before="Magic numbers are hidden in the following text. Remember them; you will be asked for them.\n\n",
        pieces=(f" {sentence}" for sentence in cycle(HAYSTACK)),
        hidden=[f" One of the magic numbers of {name} is {number}." for name, number in said],
        question=f"What {'are' if values > 1 else 'is'} {many} of {names[0]} in the text?",
        lead=f" In the text, {many} of {names[0]} {'are' if values > 1 else 'is'}",
        answers=answers,
        new_tokens=16 * values,
    )


def _single(draw: random.Random) -> Task:
    return _hidden_numbers(draw, 1, 1)


def _multikey(draw: random.Random) -> Task:
    return _hidden_numbers(draw, DISTRACTORS + 1, 1)


def _multivalue(draw: random.Random) -> Task:
    return _hidden_numbers(draw, 1, VALUES)


def _variables(draw: random.Random) -> Task:
    """A chain of variables: the first has a number, each other one the value of the one before."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(draw.choices(letters, k=5))
        names += [name] if name not in names else []
    number = str(draw.randrange(10**4, 10**5))
    values = [number, *(f"VAR {name}" for name in names)]
    return Task(
        before="Variables are assigned in the following text. Keep track of their values.\n\n",
        pieces=(f" {sentence}" for sentence in cycle(HAYSTACK)),
        hidden=[f" VAR {name} = {value}." for name, value in zip(names, values, strict=False)],
        question=f"Which variables have the value {number}?",
        lead=f" {len(names)} variables have the value {number}:",
        answers=tuple(names),
        new_tokens=48,
    )


def _common_words(draw: random.Random) -> Task:
    """A numbered list of words, half of whose entries are a few words that come again and again."""
    words = draw.sample(NOUNS, COMMON)
    others = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS if noun not in words]

    def pieces() -> Iterator[str]:
        count, rare = 0, cycle(draw.sample(others, len(others)))
        while True:
            stretch = words * TIMES + [next(rare) for _ in range(COMMON * TIMES)]
            draw.shuffle(stretch)
            for word in stretch:
                count += 1
                yield f" {count}. {word}"

    return Task(
        before="The following is a numbered list of words. Some of them come often. Remember those.\n\n",
        pieces=pieces(),
        hidden=(),
        question=f"Which are the {COMMON} words that come most often in the list?",
        lead=f" The {COMMON} words that come most often in the list are:",
        answers=tuple(words),
        new_tokens=64,
    )


def _frequent_words(draw: random.Random) -> Task:
    """A text of invented words, a few of which are far more frequent than all others."""
    every = list({"".join(draw.choices(SYLLABLES, k=3)): None for _ in range(400)})
    words, others = every[: len(FREQUENT)], cycle(every[len(FREQUENT) :])

    def pieces() -> Iterator[str]:
        while True:
            often = [word for word, times in zip(words, FREQUENT, strict=True) for _ in range(times)]
            stretch = often + [next(others) for _ in range(100 - len(often))]
            draw.shuffle(stretch)
            yield from (f" {word}" for word in stretch)

    return Task(
        before="The following text is in code. Keep track of how often each word comes.\n\n",
        pieces=pieces(),
        hidden=(),
        question=f"Which are the {len(FREQUENT)} words that come most often in the text?",
        lead=f" The {len(FREQUENT)} words that come most often in the text are:",
        answers=tuple(words),
        new_tokens=24,
    )


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "variables": _variables,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
}
"""Of a source of randomness, by name."""


def ruler_prompt(tokenizer: PreTrainedTokenizerBase, name: str, tokens: int, seed: int) -> RulerPrompt:
    """A prompt of exactly `tokens` tokens, through the chat template where the tokenizer has one.

    Args:
        tokenizer: Of the model.
        name: One of `TASKS`.
        tokens: Length of the prompt, with question and template.
        seed: Of what is drawn. The same for all lengths and tokenizers: only how much context there is differs.

    Raises:
        ValueError: an unknown task, or too few tokens for what is hidden, the question and some context.
    """
    if name not in TASKS:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {name!r}")
    draw = random.Random(f"{name} {seed}")
    task = TASKS[name](draw)

    def ids_of(pieces: Iterable[str]) -> Iterator[list[int]]:
        return (tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces)

    start, end = around(tokenizer, task.question, before=task.before, lead=task.lead)
    hidden = list(ids_of(task.hidden))
    room = tokens - len(start) - len(end) - sum(map(len, hidden))
    if room < 64:
        raise ValueError(f"a prompt of {tokens} tokens has no room for a context beside what task {name!r} needs")
    context, borders = filled(ids_of(task.pieces), room)
    for at, ids in reversed(list(zip(_places(draw, borders, len(hidden)), hidden, strict=True))):
        context[at:at] = ids
    row = torch.tensor([start + context + end])
    return RulerPrompt(NeedlePrompts(row, len(end), task.answers[0]), task.answers, task.new_tokens)


def _places(draw: random.Random, borders: Sequence[int], count: int) -> list[int]:
    """Ascending borders, each another one where there are enough."""
    if count <= len(borders):
        return sorted(draw.sample(borders, count))
    return sorted(draw.choices(borders, k=count))
