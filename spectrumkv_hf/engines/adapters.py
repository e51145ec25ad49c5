"""What identifies the weights of an engine's LoRA adapters, whose caches differ from the model's own and each other's.

Nothing here needs an engine.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

PATTERNS = ("adapter_config.json", "*.safetensors", "*.bin", "*.pt")
"""Files that an adapter's weights follow from."""

Stamp = tuple[tuple[str, int, int, int], ...]


class Adapters:
    """Digests of adapters' files, each read when a request first names its adapter.

    An engine loads an adapter's files once and then knows it by a number. Files that change under a number may be the
    loaded ones or not: such an adapter has no identity any more, unless its request says that it is loaded anew.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Stamp, str]] = {}

    def identity(self, request: Any) -> str | None:
        """Of a request's adapter: "" for none, 32 hex digits, or None where its weights can't be told.

        Args:
            request: None, or vLLM's `LoRARequest`, of which `lora_int_id`, `lora_path` and `load_inplace` are read.
        """
        if request is None:
            return ""
        number, path = request.lora_int_id, request.lora_path
        try:
            files = _files(Path(path)) if path else []
            stamp = tuple(_stamp(file) for file in files)
            known = self._known.get(number)
            if known is None or (known[0] != stamp and getattr(request, "load_inplace", False)):
                known = self._known[number] = stamp, _digest(files)
        except OSError:
            return None
        return known[1] if files and known[0] == stamp else None


def _files(folder: Path) -> list[Path]:
    return sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})


def _stamp(file: Path) -> tuple[str, int, int, int]:
    """Changes when the file does, without its being read."""
    found = os.stat(file)
    return file.name, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(files: list[Path]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as opened:
            content = hashlib.file_digest(opened, hashlib.blake2b)
        whole.update(f"{len(file.name)} {file.name}".encode() + content.digest())
    return whole.hexdigest()
