"""optimum-quanto as tests import it: it would compile its C++ at first use, which takes a minute in a fresh clone."""

from types import SimpleNamespace

import pytest
import torch


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What is compiled: the codes of several tokens that lie in each byte, one after another."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


def import_quanto() -> None:
    """Skips a test where it is not installed."""
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension

    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpack)
