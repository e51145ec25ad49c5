"""Fixtures for all tests: NaN in fresh memory, tiny models of many families."""

import os

import pytest
import torch
from interpreter import spare_repetitions

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on CPU tensors; read when they are defined
    spare_repetitions()

torch.set_num_threads(1)  # tiny tensors: threads would only wait for one another


class AtOnce:
    """Names tests as they fail, so that a run which is cut short has said which they were."""

    def __init__(self, reporter):
        self.reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reporter.ensure_newline()
            self.reporter.write_line(f"failed: {report.nodeid}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(reporter))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What `torch.empty` returns is NaN, so that a result which depends on unwritten memory shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
