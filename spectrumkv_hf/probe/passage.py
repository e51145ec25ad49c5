"""Texts for calibration and examples that need no download."""

from pathlib import Path

TEXTS = ("passage", "article", "code")
"""Prose, an encyclopaedia's article whose names and numbers come back again and again, and a module in Python: layers
that look names up matter in the last two."""


def passage() -> str:
    """A text of about 1400 words on the tides, written for this project, so that no model has trained on it."""
    return text(TEXTS[0])


def text(name: str) -> str:
    """One of `TEXTS`, all of which were written for this project; 1500 tokens and more for most tokenizers."""
    return Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8")
