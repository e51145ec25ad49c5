"""README and docs: short, with lines that can be read, and right about the names and places that they mention."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from test_imports import FLOORS, PACKAGES
from test_versions import PROJECT

from spectrumkv_hf import POLICIES, Policy

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SPANS = sorted(
    {
        (path, span)
        for path in DOCUMENTS
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M))
    }
)


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_lines_of_prose_are_short(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert not [number for number, line in lines if len(line) > 124 and not line.startswith("|")]


def exists(name):
    """Whether a dotted name of these packages leads anywhere."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as problem:
            if not name.startswith(problem.name or " "):
                return True  # a module that needs an optional package
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_names_in_documents_exist():
    names = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"\bspectrumkv_(?:hf|kernels)(?:\.\w+)+", path.read_text(encoding="utf-8"))
        if not name.endswith(".py")
    }
    assert len(names) > 15 and exists("spectrumkv_hf.SpectrumCache.reset") and not exists("spectrumkv_hf.cache.update")
    assert not [name for name in sorted(names) if not exists(name)]


def test_places_in_documents_exist():
    """Files and folders of the repository; with `*` at least one."""
    first = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"dist", "site", "evaluation"}
    places = {
        (path.name, span) for path, span in SPANS if "/" in span and span.split("/")[0] in first and " " not in span
    }
    assert len(places) > 8
    assert not [place for place in sorted(places) if not list(ROOT.glob(place[1].rstrip("/")))]


def rows(heading):
    """What stands first, as code, in the rows of the first table below a heading of the guide."""
    part = re.split(rf"^#+ {heading}\n", (ROOT / "docs/guide.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    return {
        name
        for cell in re.findall(r"^\|([^|]*)\|", part.split("\n#")[0], re.M)
        for name in re.findall(r"`(\w+)`", cell)
    }


def test_the_guide_names_every_policy_and_option():
    options = {field.name for field in dataclasses.fields(Policy)} - {"budget"}
    assert rows("Policies") == {*POLICIES} | options


@pytest.mark.parametrize("package", FLOORS)
def test_structure_has_every_room_in_order(package):
    text = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## `{package}`\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    rooms = [room for room in FLOORS[package] if room]
    assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == rooms
    folders = {
        path.stem for path in PACKAGES[package].iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert folders - {"__init__"} <= {*rooms}


def test_badges_say_what_the_project_declares():
    badges = re.findall(r"img\.shields\.io/badge/([^)]*)-blue", (ROOT / "README.md").read_text())
    said = dict(badge.replace("--", "~").split("-") for badge in badges)
    lowest = next(iter(SpecifierSet(PROJECT["requires-python"])))
    assert said.pop("python") == f"{lowest.version}%2B" and lowest.operator == ">="
    low, high = said.pop("transformers").split("~")
    (bounds,) = (line.removeprefix("transformers") for line in PROJECT["dependencies"] if "transformers" in line)
    assert SpecifierSet(bounds) == SpecifierSet(f">={low},<5.{int(high.split('.')[1]) + 1}")
    assert said.pop("licence") == PROJECT["license"].replace("-", "~") and not said
