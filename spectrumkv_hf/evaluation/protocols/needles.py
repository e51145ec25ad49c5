"""Needle in a haystack over the cache of any method; `spectrumkv_hf.probe.needles` has the task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrumkv_hf.evaluation.metrics import load
from spectrumkv_hf.evaluation.protocols.quality import ratios
from spectrumkv_hf.evaluation.subjects.methods import Method
from spectrumkv_hf.probe.needles import NeedlePrompts, ask
from spectrumkv_hf.tiered.memory import MemoryReport

DEPTHS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""The paper's 19 relative depths, .05 to .95."""


class Answers(NamedTuple):
    """What a model said to prompts, and the bytes of the cache before the first token of the answers."""

    texts: list[str]
    memory: MemoryReport


def ask_over(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    prompts: NeedlePrompts,
    max_new_tokens: int = 32,
    asked_before: bool = True,
) -> Answers:
    """Greedy answers over a method's cache; arguments as of `spectrumkv_hf.probe.needles.ask`."""
    cache = method.cache(model)
    memory: list[MemoryReport] = []

    @contextmanager
    def watched() -> Iterator[None]:
        with method.prefilling(model):
            yield
        memory.append(method.memory(cache))

    texts = ask(model, tokenizer, cache, prompts, max_new_tokens, asked_before=asked_before, prefilling=watched())
    return Answers(texts, memory[0])


def summarised(said: Sequence[tuple[str, str]], actual: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Recall and bytes by the modules that compute them.

    Args:
        said: Texts, and what each had to hold.
        actual: Bytes of the caches over those of two bytes an element.
    """
    texts, answers = zip(*said, strict=True)
    recall = load("needle_recall", keep_in_memory=True).compute(predictions=texts, references=answers)
    return {"needle_recall": recall, "kv_memory": ratios(actual)}
