"""The evaluation's rooms: what is measured, how, what is said of it, and the experiments; imports go down them only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from spectrumkv_hf import evaluation

NAME = evaluation.__name__
FOLDER = Path(evaluation.__file__).parent
ROOMS = ("subjects", "metrics", "protocols", "report", "experiments")
"""From the ground up."""
FILES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.py") if path.parent != FOLDER)


def test_every_room_is_known():
    assert {path.parts[0] for path in FILES} == {*ROOMS}
    assert [path.name for path in FOLDER.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    for node in ast.walk(ast.parse((FOLDER / path).read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if module.startswith(f"{NAME}."):
                there = module.removeprefix(f"{NAME}.").split(".")[0]
                assert ROOMS.index(there) <= ROOMS.index(path.parts[0]), f"{path}:{node.lineno} imports {module}"


def test_who_imports_what():
    """The probe does not load the evaluation, which loads without matplotlib: only drawing needs that."""
    code = f"""
import sys
import spectrumkv_hf.probe
assert not [name for name in sys.modules if name.startswith("{NAME}")]
sys.modules["matplotlib"] = None  # an import of it raises ImportError
import {NAME}.experiments.run_all, {NAME}.report.figures, spectrumkv_hf.commands.eval
from {NAME}.experiments import EXPERIMENTS
assert "needles" in EXPERIMENTS
try:
    {NAME}.report.figures.new_figure("")
except ImportError as problem:
    assert "needs the package matplotlib" in str(problem), problem
else:
    raise AssertionError("a figure was drawn")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
