"""A text for calibration and examples that needs no download."""

from pathlib import Path


def passage() -> str:
    """A text of about 1400 words on the tides, written for this project, so that no model has trained on it."""
    return Path(__file__).with_name("passage.txt").read_text(encoding="utf-8")
