"""Verdicts on disk, by what they depend on.

One file a verdict, `<digest of the key>.json` in the folder `probe` of those that `cache_folder` has rules
for. A file appears whole, under its final name, so processes may write and read at the same time: the last one
wins, and all have measured the same.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from spectrumkv_kernels.backend import cache_folder

logger = logging.getLogger(__name__)

FORMAT = 1
KIND = "probe"
"""Of files, for `cache_folder`."""


def digest(ids: torch.Tensor) -> str:
    """Of token ids."""
    return hashlib.blake2b(ids.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def name_of(key: dict[str, Any]) -> str:
    """The name of a key's file."""
    return f"{_checksum(key)}.json"


def stored_at(key: dict[str, Any]) -> Path | None:
    """The file that holds the verdict for a key; None where there is none."""
    return None if read(key) is None else cache_folder.location(KIND) / name_of(key)


def read(key: dict[str, Any]) -> Any:
    """The verdict stored for a key, as JSON has it; None where there is none or the file can't be relied on."""
    try:
        with cache_folder.opened(KIND, create=False) as folder:
            entry = json.loads(folder.read(name_of(key)))
        if entry["format"] != FORMAT or entry["key"] != key or entry["checksum"] != _checksum(entry["verdict"]):
            raise ValueError("its parts do not fit together")
    except FileNotFoundError:
        return None
    except OSError as problem:  # it says where
        logger.warning("ignoring a verdict of the probe: %s", problem)
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        path = cache_folder.location(KIND) / name_of(key)
        logger.warning("ignoring the probe's verdict in %s: %s", path, problem)
        return None
    return entry["verdict"]


def write(key: dict[str, Any], verdict: Any) -> None:
    """Store a verdict, as JSON has it. Where that can't be done a warning says so."""
    entry = {"format": FORMAT, "key": key, "verdict": verdict, "checksum": _checksum(verdict)}
    try:
        with cache_folder.opened(KIND) as folder:
            folder.write(name_of(key), json.dumps(entry, indent=1).encode())
    except OSError as problem:
        logger.warning("the probe's verdict can't be stored: %s", problem)


def _checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
