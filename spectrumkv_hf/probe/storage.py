"""Verdicts on disk, by what they depend on.

One file a verdict, `$XDG_CACHE_HOME/spectrumkv/probe/<digest of the key>.json` (`~/.cache` where the variable is
unset). A file appears whole, under its final name, so processes may write and read at the same time: the last one wins,
and all have measured the same.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from spectrumkv_hf.whole_file import whole_file

logger = logging.getLogger(__name__)

FORMAT = 1


def folder() -> Path:
    """Where verdicts lie. A relative `XDG_CACHE_HOME` counts as unset, as its specification has it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "spectrumkv" / "probe"


def digest(ids: torch.Tensor) -> str:
    """Of token ids."""
    return hashlib.blake2b(ids.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def path_of(key: dict[str, Any]) -> Path:
    """The file of a key."""
    return folder() / f"{_checksum(key)}.json"


def read(key: dict[str, Any]) -> Any:
    """The verdict stored for a key, as JSON has it; None where there is none or the file is damaged."""
    path = path_of(key)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["format"] != FORMAT or entry["key"] != key or entry["checksum"] != _checksum(entry["verdict"]):
            raise ValueError("its parts do not fit together")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        logger.warning("ignoring the probe's verdict in %s: %s", path, problem)
        return None
    return entry["verdict"]


def write(key: dict[str, Any], verdict: Any) -> None:
    """Store a verdict, as JSON has it. Where that can't be done a warning says so."""
    path = path_of(key)
    entry = {"format": FORMAT, "key": key, "verdict": verdict, "checksum": _checksum(verdict)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(entry, indent=1).encode())
    except OSError as problem:
        logger.warning("the probe's verdict can't be stored: %s", problem)


def _checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
