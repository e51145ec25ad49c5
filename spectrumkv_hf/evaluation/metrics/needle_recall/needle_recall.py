"""How many needles in a haystack were found: the share of answers that contain what was asked for.

Loaded by `evaluate.load`, which copies this file alone: it imports nothing of the package, and one module a line,
because `evaluate` finds imports with a pattern that reads single lines.
"""

import datasets
import evaluate

DESCRIPTION = """
Recall of needles that were hidden in long contexts: the share of generated texts that contain their needle's answer,
in whatever case.
"""

INPUTS = """
Args:
    predictions: generated texts, without the prompt, which holds the answer.
    references: the answer of each text's needle.

Returns:
    recall: found / total.
    found: texts that contain their answer.
    total: all texts.

Raises:
    ValueError: no texts, or an empty answer, which every text contains.

Examples:
    >>> metric = evaluate.load(path, module_type="metric")
    >>> metric.compute(predictions=["It is unicorn7.", "I can't tell."], references=["UNICORN7", "Zanthor"])
    {'recall': 0.5, 'found': 1, 'total': 2}
"""


class NeedleRecall(evaluate.Metric):
    """Share of texts that contain their answer."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | int]:
        if not predictions:
            raise ValueError("needle_recall needs one text or more, got none")
        if not all(references):
            raise ValueError(f"the answer of text {references.index('')} is empty, and every text would contain it")
        found = sum(answer.lower() in text.lower() for text, answer in zip(predictions, references, strict=True))
        return {"recall": found / len(predictions), "found": found, "total": len(predictions)}
