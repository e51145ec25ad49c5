"""Documents of the tasks in this folder, which need no hub, and how they are scored."""

import re
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from spectrumkv_hf.probe.needles import HAYSTACK, NEEDLES


def articles(text_file: str = "", **_: Any) -> dict[str, Dataset]:
    """The articles of a text in WikiText's layout, ` = Title = ` on the first line of each.

    Args:
        text_file: UTF-8, relative to the current folder.

    Raises:
        ValueError: no file is named.
    """
    if not text_file:
        raise ValueError('task wikitext_file reads a text: give --metadata \'{"text_file": "wikitext-2/test.txt"}\'')
    text = Path(text_file).read_text(encoding="utf-8")
    parts = re.split(r"^(?= = [^=\n]+ = $)", text, flags=re.MULTILINE)
    return {"test": Dataset.from_dict({"text": [part for part in parts if part.strip()]})}


def per_word(doc: dict[str, str], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of an article with its length in words and in bytes, as lm-eval's `wikitext` counts them."""
    (log_likelihood,) = results
    words, size = len(re.split(r"\s+", doc["text"])), len(doc["text"].encode())
    by_byte = (log_likelihood, size)
    return {"word_perplexity": (log_likelihood, words), "byte_perplexity": by_byte, "bits_per_byte": by_byte}


def needles(sentences: int = 80, depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9), **_: Any) -> dict[str, Dataset]:
    """Every needle at every depth of a haystack; the first five differ in both, so that a small --limit says something.

    Args:
        sentences: Length of the haystack; eleven tokens each, about. SmolLM2-135M finds 8 of 10 needles in 80.
        depths: Fractions of it that stand before the needle.
    """
    hay = list(islice(cycle(HAYSTACK), sentences))
    rows = []
    for shift in range(len(depths)):
        for index, needle in enumerate(NEEDLES):
            depth = depths[(index + shift) % len(depths)]
            at = round(depth * sentences)
            context = " ".join([*hay[:at], needle.sentence, *hay[at:]])
            rows.append({"context": context, "question": needle.question, "answer": needle.answer, "depth": depth})
    return {"test": Dataset.from_list(rows)}


def found(doc: dict[str, str], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer is in the generated text."""
    return {"found": float(doc["answer"].lower() in results[0].lower())}
