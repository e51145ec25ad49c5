import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = """
    attend_kernel prepare_kernel merge_kernel _encode_kernel _dense_kernel digest_kernel
    sums_kernel mean_kernel power_kernel size_kernel query_kernel count_kernel rank_kernel order_kernel
    _normalisers_kernel _join_kernel _mass_kernel
    append_kernel
"""


@pytest.mark.parametrize("ways", [(), pytest.param(("all",), marks=pytest.mark.slow)])
def test_kernels_compile_for_an_h100(ways, tmp_path):
    """What the interpreter runs is not always Triton: the compiler takes less of Python."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    root = here.parents[2]
    folders = (here.parent / "attention", root / "tests/support", root / "kernels", root)
    path = os.pathsep.join(map(str, folders))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": path,
        "TRITON_CACHE_DIR": str(tmp_path),  # so that it compiles
    }
    command = [sys.executable, here / "compile_kernels.py", *ways]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(KERNELS.split()) <= set(done.stdout.split())
