"""Needle in a haystack: does a model still find one sentence of a long context, over a compressed cache?

The paper's task (section on retrieval): five generic sentences repeated, a secret at a relative depth, 32 tokens
decoded greedily, success where the answer is a substring. Its released script lacks the question that its numbers were
made with; the wording here is ours.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from spectrumkv_hf.probe.divergence import logits_over

HAYSTACK = (
    "The grass is green and the sky is blue.",
    "The sun rises in the east and sets in the west.",
    "People walk along the river in the evening.",
    "The market opens early and closes before dark.",
    "Rain falls on the hills and runs down to the sea.",
)
"""Sentences repeated in turn."""


class Needle(NamedTuple):
    """A sentence to hide, what is asked of it, and the answer, which the sentence holds."""

    sentence: str
    question: str
    answer: str


NEEDLES = (
    Needle("The secret code is UNICORN7.", "What is the secret code?", "UNICORN7"),
    Needle("The password of the vault is BLUEFISH42.", "What is the password of the vault?", "BLUEFISH42"),
    Needle("The name of the hidden island is Zanthor.", "What is the name of the hidden island?", "Zanthor"),
    Needle("The number of the locker is 83921.", "What is the number of the locker?", "83921"),
    Needle("The captain of the lost ship is Marwick.", "Who is the captain of the lost ship?", "Marwick"),
)

_MARK = "<<<haystack>>>"


class NeedlePrompts(NamedTuple):
    """Prompts that differ in the depth of one needle only.

    Attributes:
        ids: `[depths, tokens]`.
        question: How many of the last tokens ask the question; those before are the context.
        answer: What a right answer contains.
    """

    ids: torch.Tensor
    question: int
    answer: str


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase, needle: Needle, depths: Sequence[float], tokens: int
) -> NeedlePrompts:
    """Prompts of exactly `tokens` tokens, through the chat template where the tokenizer has one.

    Args:
        tokenizer: Of the model.
        needle: What is hidden and asked.
        depths: Fractions of the haystack that stand before the needle; it goes to the next border of sentences.
        tokens: Length of every prompt, question and template included.

    Raises:
        ValueError: a depth out of 0 to 1, or too few tokens for needle, question and a sentence.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths are fractions from 0 to 1, got {list(depths)}")
    start, end = around(tokenizer, needle.question, also=" Answer with the exact words of the text.")
    hidden = tokenizer(" " + needle.sentence, add_special_tokens=False).input_ids
    sentences = [tokenizer(" " + sentence, add_special_tokens=False).input_ids for sentence in HAYSTACK]
    room = tokens - len(start) - len(hidden) - len(end)
    if room < max(map(len, sentences)):
        raise ValueError(f"a prompt of {tokens} tokens has no room for a haystack beside needle and question")
    hay, borders = filled(cycle(sentences), room)
    rows = []
    for depth in depths:
        at = min(borders, key=lambda border: abs(border - depth * room))
        rows.append(start + hay[:at] + hidden + hay[at:] + end)
    return NeedlePrompts(torch.tensor(rows), len(end), needle.answer)


def around(
    tokenizer: PreTrainedTokenizerBase, question: str, *, before: str = "", also: str = "", lead: str = ""
) -> tuple[list[int], list[int]]:
    """Ids before and behind a context about which something is asked, by the chat template where there is one.

    Args:
        tokenizer: Of the model.
        question: What is asked behind the context.
        before: What is said before it.
        also: What is said behind the question in a chat.
        lead: How the answer begins.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    if not tokenizer.chat_template:
        return [*tokenizer("").input_ids, *ids_of(before)], ids_of(f"\n\nQuestion: {question}\nAnswer:{lead}")
    message = [{"role": "user", "content": f"{before}{_MARK}\n\n{question}{also}"}]
    text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    head, tail = text.split(_MARK)
    return ids_of(head), ids_of(tail + lead.lstrip())


def filled(pieces: Iterable[list[int]], room: int) -> tuple[list[int], list[int]]:
    """The first `room` ids of some pieces, and where pieces begin and end in them."""
    ids: list[int] = []
    borders = [0]
    for piece in pieces:
        ids += piece
        borders.append(min(len(ids), room))
        if len(ids) >= room:
            break
    return ids[:room], borders


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    prompts: NeedlePrompts,
    max_new_tokens: int = 32,
    *,
    asked_before: bool = True,
    first_exact: bool = False,
    prefilling: AbstractContextManager[Any] | None = None,
) -> list[str]:
    """Greedy answers over a cache.

    Tokens are prefilled in exact precision and compressed, but for the last or the question, so that every token of
    the answer, the first included, is predicted over the stored cache.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        cache: An empty one.
        prompts: One batch.
        max_new_tokens: Decoded greedily.
        asked_before: The question is prefilled with the context, so that importance may see it; False: the context
            alone is compressed and the question comes after it.
        first_exact: Prefill the last token too, whose exact logits give the first token of the answer, as the paper's
            code does.
        prefilling: Entered before the prefill and left after it.
    """

    def last_logits(ids: torch.Tensor, start: int) -> torch.Tensor:
        return logits_over(model, ids, cache, start, last=1)[:, -1]

    ids = prompts.ids.to(model.device)
    context = ids.shape[1] - (prompts.question if not asked_before else 0 if first_exact else 1)
    with prefilling or nullcontext():
        logits = last_logits(ids[:, :context], 0)
    if context < ids.shape[1]:
        logits = last_logits(ids[:, context:], context)
    answer = [logits.argmax(-1, keepdim=True)]
    for position in range(ids.shape[1], ids.shape[1] + max_new_tokens - 1):
        answer.append(last_logits(answer[-1], position).argmax(-1, keepdim=True))
    return tokenizer.batch_decode(torch.cat(answer, dim=1), skip_special_tokens=True)


def found(texts: Sequence[str], answer: str) -> list[bool]:
    """Which texts hold the answer, in whatever case."""
    return [answer.lower() in text.lower() for text in texts]
