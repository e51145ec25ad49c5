import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_folder_is_no_package():
    """It would shadow Hugging Face's package of that name, which Transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()


def test_nothing_here_shadows_the_kernels_package():
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        origin = Path(spec.origin).resolve()  # of Hugging Face's package, whose environment may lie in this folder
        assert origin.is_relative_to(Path(sys.prefix).resolve()) or not origin.is_relative_to(ROOT)


def test_import_needs_no_transformers(tmp_path):
    """Nor anything else outside its own folder but torch."""
    code = (
        "import sys, spectrumkv_kernels as k; print(k.__file__, 'transformers' in sys.modules, "
        "'spectrumkv_hf' in sys.modules, all(hasattr(k, name) for name in k.__all__))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    path, *facts = done.stdout.split()
    assert Path(path).is_relative_to(ROOT / "kernels")
    assert facts == ["False", "False", "True"]


def test_wheel_holds_the_sources_of_compiled_kernels():
    """They are built where they are used."""
    included = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    kernels = ROOT / "kernels"
    sources = {str(path.relative_to(kernels)) for path in kernels.rglob("*") if path.suffix in (".cpp", ".h")}
    assert "spectrumkv_kernels/attention/attention.cpp" in sources and sources <= included
