"""The versions in constraints.txt and pyproject.toml fit together, and fit what is published."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(requirement.name): Version(next(iter(requirement.specifier)).version)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
LINUX = {
    "platform_system": "Linux",
    "sys_platform": "linux",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "extra": "",
}
OFFLINE = re.compile(
    r"Retrying \(Retry\(|NewConnectionError|Connection(Error| refused)|name resolution|timed? ?out", re.I
)
TESTED_TRITON = {Version("3.6.0"), Version("3.7.1"), Version("3.9.0")}


def own_requirements():
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def unmet(pins, requirements):
    """Which requirements, `(of whom, what)`, those pins break for a Linux user; requirements on others don't matter."""
    return [
        f"{whose} requires {requirement}, constraints.txt has {pins[name]}"
        for whose, requirement in requirements
        if (name := canonicalize_name(requirement.name)) in pins
        and (requirement.marker is None or requirement.marker.evaluate(LINUX))
        and pins[name] not in requirement.specifier
    ]


def published(*specifiers):
    """What pip reports of packages that an index has, `{name: metadata}`; their wheels are not downloaded.

    A local build of PyTorch, such as 2.13.0+cpu, has other requirements than the public 2.13.0: `===` keeps it out.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
    found = subprocess.run(
        [*command, "--retries", "1", "--quiet", "--report", "-", *specifiers], capture_output=True, text=True
    )
    if found.returncode and OFFLINE.search(found.stderr):
        pytest.skip("needs a package index: none could be reached")
    assert found.returncode == 0, found.stderr
    return {
        canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in json.loads(found.stdout)["install"]
    }


def requirements_of(packages):
    return [
        (f"{name} {about['version']}", Requirement(text))
        for name, about in packages.items()
        for text in about.get("requires_dist", ())
    ]


def test_pins_are_within_the_projects_bounds():
    own = [("pyproject.toml", requirement) for requirement in own_requirements()]
    assert not unmet(PINS, own)
    assert {"torch", "transformers", "triton"} <= PINS.keys()
    for requirement in own_requirements():
        assert canonicalize_name(requirement.name) in PINS, f"constraints.txt has no {requirement.name}"


def test_the_check_sees_what_the_cpu_wheel_of_pytorch_hid():
    needs = [("torch 2.13.0", Requirement("triton==3.7.1; platform_system == 'Linux'"))]
    assert unmet(PINS | {"triton": Version("3.6.0")}, needs) == [
        'torch 2.13.0 requires triton==3.7.1; platform_system == "Linux", constraints.txt has 3.6.0'
    ]
    assert not unmet(
        PINS | {"triton": Version("3.6.0")}, [("torch", Requirement("triton==3; sys_platform == 'win32'"))]
    )


def test_constraints_can_be_satisfied_by_what_is_published():
    """Of a user on Linux with CUDA: the pins fulfil each other's requirements and run on the declared Python."""
    source_only = {"hqq", "jieba"}  # asking would build it
    packages = published(*(f"{name}==={version}" for name, version in PINS.items() if name not in source_only))
    assert packages.keys() == PINS.keys() - source_only
    assert all(Version(about["version"]) == PINS[name] for name, about in packages.items())
    requirements = requirements_of(packages)
    assert any(whose.startswith("torch ") and need.name == "triton" for whose, need in requirements)
    for name in source_only:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        requirements += [(f"{name} {PINS[name]}", Requirement(text)) for text in needs]
    assert not unmet(PINS, requirements)
    lowest = min(Version(clause.version) for clause in Requirement("python" + PROJECT["requires-python"]).specifier)
    for name, about in packages.items():
        assert lowest in Requirement("python" + (about.get("requires_python") or "")).specifier, name


def test_the_lowest_pytorch_brings_a_tested_triton():
    torch = next(requirement for requirement in own_requirements() if requirement.name == "torch")
    lowest = min(Version(clause.version) for clause in torch.specifier)
    packages = published(f"torch==={lowest}.0")
    (triton,) = (need for _, need in requirements_of(packages) if need.name == "triton" and need.marker.evaluate(LINUX))
    assert any(version in triton.specifier for version in TESTED_TRITON), triton


def test_the_matrix_is_within_the_bounds_and_at_their_ends():
    makefile = (ROOT / "Makefile").read_text()
    pairs = re.search(r"^MATRIX := (.*)$", makefile, re.M)[1].split()
    transformers, triton = (
        {Version(version) for version in versions} | {PINS[name]}
        for name, versions in zip(
            ("transformers", "triton"), zip(*(pair.split("+") for pair in pairs), strict=True), strict=True
        )
    )
    (bounds,) = (r.specifier for r in map(Requirement, PROJECT["dependencies"]) if r.name == "transformers")
    assert all(version in bounds for version in transformers)
    low, high = sorted(Version(clause.version) for clause in bounds)
    assert min(transformers).release[:2] == low.release[:2]
    assert max(transformers).release[:2] == (high.release[0], high.release[1] - 1)
    assert triton == TESTED_TRITON
