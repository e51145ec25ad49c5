"""What was measured, in a JSON file that grows cell by cell, so that a run which was cut off goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spectrumkv_hf.support.extras import required
from spectrumkv_hf.support.whole_file import write_whole

Cell = dict[str, Any]


class Results:
    """The cells of one evaluation.

    Args:
        path: Written after every cell; cells that it holds already are not measured again. None: nothing is written.
        settings: What the cells depend on, as JSON has it.
        environment: Versions and device, as JSON has them.

    Attributes:
        cells: By key.
        table: A summary that is written beside the cells, and not read again.
        metrics: Its numbers in full, the same.

    Raises:
        ValueError: the file holds results of other settings or of another environment, or is no such file.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.settings, self.environment = _as_json(settings), _as_json(environment)
        self.cells: dict[str, Cell] = {}
        self.table: dict[str, Any] | None = None
        self.metrics: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(held["cells"], dict):
                raise TypeError
            for name, own in (("settings", self.settings), ("environment", self.environment)):
                if changed := sorted(key for key in {*held[name], *own} if held[name].get(key) != own.get(key)):
                    raise ValueError(f"{path} holds results of another {name} ({', '.join(changed)}): remove it")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no file of results") from None
        self.cells = held["cells"]

    def cell(self, key: str, measure: Callable[[], Cell]) -> Cell:
        """The cell `key`, measured unless the file holds it."""
        if key not in self.cells:
            self.cells[key] = _as_json(measure())
            self.write()
        return self.cells[key]

    def write(self) -> None:
        """Replace the file by what is held."""
        if self.path is not None:
            write_whole(self.path, json.dumps(self._content(), indent=1))

    def save(self) -> None:
        """The same by `evaluate.save`, which adds the time, the commit of the working directory and versions.

        Where there is no git, which it asks for the commit, the file is as `write` leaves it.

        Raises:
            ImportError: the package `evaluate` is missing.
        """
        self.write()
        if self.path is None or shutil.which("git") is None:
            return
        with TemporaryDirectory() as folder:  # evaluate.save writes in place, and a run may be cut off
            record = required("evaluate", "Results.save").save(Path(folder, "results.json"), **self._content())
            saved = json.loads(record.read_text(encoding="utf-8"))
        del saved["_interpreter_path"]  # results are shared, and folders of the machine are nobody's business
        write_whole(self.path, json.dumps(saved, indent=1))

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"environment": self.environment, "settings": self.settings, "cells": self.cells}
        if self.table is not None:
            content["table"] = self.table
        if self.metrics:
            content["metrics"] = self.metrics
        return content


def _as_json(value: Any) -> Any:
    """As it comes back from a file, so that fresh cells and read ones are equal."""
    return json.loads(json.dumps(value, default=str))
