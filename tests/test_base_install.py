"""What works with nothing but the declared dependencies: every --help, every module; and what a missing extra says."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

import spectrumkv_hf
from spectrumkv_hf.evaluation.metrics import MODULES
from spectrumkv_hf.support.extras import INSTALL

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"lm_eval": "lm-eval", "optimum": "optimum-quanto"}
"""Of modules, where they have another name."""
BLOCKED = sorted({*INSTALL, "lmcache", "nixl_cu12", "nixl_cu13", "triton", "vllm", "pandas", "scipy", "sklearn"})

RUNNER = """
import contextlib, importlib, io, json, pkgutil, runpy, sys
from importlib import machinery

blocked, jobs = json.loads(sys.argv[1])
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in blocked else find(name, *rest)
)

def command(*arguments):
    from spectrumkv_hf.commands.main import main
    main(arguments)

def example(path, *arguments):
    sys.argv, sys.path[0] = [path, *arguments], path.rpartition("/")[0]
    runpy.run_path(path, run_name="__main__")

def module(name):
    importlib.import_module(name)

results = []
for kind, *arguments in jobs:
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            {"command": command, "example": example, "module": module}[kind](*arguments)
        except SystemExit as end:
            status = end.code or 0
        except BaseException as problem:
            status = repr(problem)
    results.append([status, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""


def command_jobs():
    from spectrumkv_hf.commands.main import COMMANDS
    from spectrumkv_hf.evaluation.experiments import EXPERIMENTS

    commands = [["--help"], *([name, "--help"] for name in COMMANDS)]
    commands += [["eval", name, "--help"] for name in ("all", *EXPERIMENTS)]
    return [["command", *arguments] for arguments in commands]


def example_jobs():
    examples = [path for path in sorted((ROOT / "examples").rglob("*.py")) if "__main__" in path.read_text()]
    return [["example", str(path), "--help"] for path in examples]


def module_jobs():
    paths = sorted((ROOT / "spectrumkv_hf").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [["module", name] for name in names]


MISSING = {
    "datasets": ["command", "eval", "perplexity"],
    "evaluate": ["command", "eval", "perplexity", "--dataset", "passage"],
    "lm_eval": ["command", "lm-eval", "--tasks", "hellaswag"],
    "gguf": ["command", "probe", "some.gguf"],
    "bitsandbytes": ["command", "probe", "some/model", "--load-in", "4bit"],
    "nixl": ["example", str(ROOT / "examples/pd_disaggregation.py"), "--transport", "nixl"],
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("missing") / "out"


def drawing_jobs(output):
    return [
        ["command", "eval", "needles", "--output", str(output)],  # a table of the paper
        ["command", "eval", "all", "--reduced", "--output", str(output)],
        ["example", str(ROOT / "examples/generate.py"), "--plot", str(output.with_name("x.png"))],
    ]


@pytest.fixture(scope="module")
def results(output):
    """Status, stdout and stderr of all of them, in one process that lacks all extras; modules are first imported."""
    jobs = [*module_jobs(), *command_jobs(), *example_jobs(), *MISSING.values(), *drawing_jobs(output)]
    code = [sys.executable, "-c", RUNNER, json.dumps([BLOCKED, jobs])]
    process = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return dict(zip(map(tuple, jobs), json.loads(process.stdout), strict=True))


def failures(jobs, results):
    return {" ".join(job): results[*job] for job in jobs if results[*job][0] != 0}


def test_help_of_every_command(results):
    assert len(command_jobs()) > 15
    assert not failures(command_jobs(), results)


def test_help_of_every_example(results):
    assert len(example_jobs()) > 9
    assert not failures(example_jobs(), results)


def test_every_module_is_importable(results):
    """But those that only make sense inside the program that loads them."""
    assert ["module", "spectrumkv_hf.evaluation.report.figures"] in module_jobs()
    failed = {name.removeprefix("module ") for name in failures(module_jobs(), results)}
    assert failed <= {
        "spectrumkv_hf.evaluation.subjects.lm_eval_model",
        "spectrumkv_hf.evaluation.protocols.generation",
        *(f"spectrumkv_hf.evaluation.metrics.{name}.{name}" for name in MODULES),
        "spectrumkv_hf.engines.lmcache_serde",
        "spectrumkv_hf.engines.vllm_connector",
    }


def test_missing_extras(results, output):
    """Before anything is loaded, in words, with a command that works in a checkout."""
    wanted = [*MISSING.items(), *(("matplotlib", job) for job in drawing_jobs(output))]
    for module, job in wanted:
        status, _, stderr = results[*job]
        assert status == 2, (job, status, stderr)
        assert stderr.startswith("error: ") and f"needs the package {module} (" in stderr, stderr
        assert INSTALL[module] in stderr
    assert not output.exists()


def test_the_commands_install_what_they_say():
    """Each names an extra of this checkout that has the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module, command in INSTALL.items():
        extra = re.fullmatch(r"pip install -c constraints\.txt '\.\[([a-z-]+)\]'(?: && .*)?", command)[1]
        packages = [re.split(r"[^\w-]", line)[0] for line in project["optional-dependencies"][extra]]
        name = DISTRIBUTIONS.get(module, module)
        assert name in packages or f"{name}==" in command, (module, command)


def test_version(capsys):
    from spectrumkv_hf.commands.main import main

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    said = capsys.readouterr().out
    assert said.startswith(f"spectrumkv-hf {spectrumkv_hf.__version__} (Python 3.")
    assert f"PyTorch {torch.__version__}" in said and f"Transformers {transformers.__version__}" in said


def test_the_build_reads_the_version_in_its_one_place():
    """Nothing else in the package or the project's file spells it out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    place = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert place == ROOT / "spectrumkv_hf/version.py"
    assert re.findall(r'^__version__ = "(.+)"$', place.read_text(), re.MULTILINE) == [spectrumkv_hf.__version__]
    for path in (ROOT / "spectrumkv_hf").rglob("*.py"):
        assert path == place or f'"{spectrumkv_hf.__version__}"' not in path.read_text(), path
