"""What is optional stays optional."""

import ast
from pathlib import Path

import spectrumkv_hf

PACKAGE = Path(spectrumkv_hf.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_core_imports_no_engine():
    core = [path for path in PACKAGE.rglob("*.py") if "engines" not in path.relative_to(PACKAGE).parts]
    assert len(core) > 20
    for path in core:
        for name in imports(path):
            assert not name.startswith("spectrumkv_hf.engines"), path
            assert name.split(".")[0] not in ("lmcache", "vllm"), path


def test_helpers_need_no_engine():
    for name in ("__init__", "blocks", "layouts", "prompt_store", "settings"):
        found = {module.split(".")[0] for module in imports(PACKAGE / "engines" / f"{name}.py")}
        assert not found & {"lmcache", "vllm"}
