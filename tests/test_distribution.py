"""What goes to a package index: the sdist, the wheel, and what their metadata says."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_versions import OFFLINE

import spectrumkv_hf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with an sdist and a wheel of this checkout."""
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    code = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(code, check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def sdist(built):
    """Sizes by name, without the leading folder."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2]: archive.getmember(name).size for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def about(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_is_whole(wheel):
    names = set(wheel.namelist())
    for folder, package in ((ROOT, "spectrumkv_hf"), (ROOT / "kernels", "spectrumkv_kernels")):
        files = (path for path in (folder / package).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".txt"))
        assert {str(path.relative_to(folder)) for path in files} <= names
        assert f"{package}/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "examples", "docs", "results")]


def test_the_sdist_has_sources_and_no_pictures_corpora_or_results(sdist):
    for name in ("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "docs/guide.md", "tests/test_readme.py"):
        assert sdist[name]
    assert not [name for name in sdist if name.endswith(".png") or name.startswith(("results/", "tests/fuzz/"))]
    assert sum(sdist.values()) < 3_000_000


def test_metadata(about):
    assert about["Version"] == spectrumkv_hf.__version__
    assert about["License-Expression"] == "Apache-2.0" and about["License-File"] == "LICENSE"
    assert "Typing :: Typed" in about.get_all("Classifier")


def test_the_readme_has_no_link_that_an_index_can_not_follow(about):
    """Where there is nothing beside the README: no relative link and no relative picture; the text is all there."""
    shown = about.get_payload(decode=True).decode()
    links = re.findall(r"\]\(([^)]*)\)", shown)
    assert any(link.startswith("https://arxiv.org/") for link in links)
    assert not [link for link in links if not link.startswith("https://")]
    source = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"\]\(", source)) > len(links)
    headings = re.findall(r"^#+ .*$", source, re.MULTILINE)
    assert re.findall(r"^#+ .*$", shown, re.MULTILINE) == headings
    assert "SpectrumCache.from_model" in shown and "docs/" not in re.sub(r"`[^`]*`", "", shown)


@pytest.mark.slow
def test_make_dist(tmp_path):
    """Builds, checks, and tries the wheel in an empty environment."""
    command = ["make", "dist", f"PYTHON={sys.executable}", f"DIST={tmp_path}/venv", f"DISTS={tmp_path}/dist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip("needs a package index: none could be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a saved cache is the same when it is loaded" in done.stdout
