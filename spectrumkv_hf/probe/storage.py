"""Verdicts on disk, by what they depend on.

One file a verdict, `$XDG_CACHE_HOME/spectrumkv/probe/<digest of the key>.json` (`~/.cache` where the variable is
unset). A file appears whole, under its final name, so processes may write and read at the same time: the last one wins,
and all have measured the same.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrumkv_hf.whole_file import write_whole

logger = logging.getLogger(__name__)

FORMAT = 1
MOST_SAMPLES = 1 << 16
"""Samples of a tensor's rows, and of its columns, at most."""
INCIDENTAL = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Fields of a config that say where a model comes from, not what it computes."""


def folder() -> Path:
    """Where verdicts lie. A relative `XDG_CACHE_HOME` counts as unset, as its specification has it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "spectrumkv" / "probe"


def fingerprint(model: PreTrainedModel) -> str:
    """What identifies a model: its config, and of its weights one element of every row and of every column.

    So all of a vector is in it, whatever scales or shifts a row or a column shows, and a finetune, which moves all
    weights; a change of single elements need not. Weights that are not in memory count by name and shape only.
    """
    seen = hashlib.blake2b(digest_size=16)
    config = model.config.get_text_config(decoder=True).to_dict()
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    seen.update(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            for tensor in _parts(value):
                seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                if tensor.device.type != "meta" and tensor.numel():
                    seen.update(_samples(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def _parts(value: Any) -> Iterator[torch.Tensor]:
    """A tensor, or those that a quantised one is made of."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _parts(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    """One element of every row and of every column, fewer where there are many, `[samples]`."""
    matrix = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
    rows, columns = matrix.shape
    row, column = (torch.arange(0, size, -(-size // MOST_SAMPLES), device=tensor.device) for size in (rows, columns))
    return torch.cat((matrix[row, row * 7919 % columns], matrix[column * 7919 % rows, column]))


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
        write_whole(path, json.dumps(entry, indent=1))
    except OSError as problem:
        logger.warning("the probe's verdict can't be stored: %s", problem)


def _checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
