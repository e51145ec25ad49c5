"""The identity of an adapter is that of its weights."""

import os
from types import SimpleNamespace

import pytest

from spectrumkv_hf.engines.adapters import Adapters


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("about")
    return tmp_path


def request(path, number=1, **more):
    return SimpleNamespace(lora_name="a", lora_int_id=number, lora_path=str(path), **more)


def test_none():
    assert Adapters().identity(None) == ""


def test_content_not_name_number_or_place(folder, tmp_path_factory):
    one = Adapters().identity(request(folder))
    assert len(one) == 32
    other = tmp_path_factory.mktemp("other")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((folder / name).read_bytes())
    assert Adapters().identity(request(other, number=7)) == one


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_retrained_under_the_old_name(folder, name):
    """Another process, or another number: another identity."""
    adapters = Adapters()
    before = adapters.identity(request(folder))
    (folder / name).write_bytes((folder / name).read_bytes()[::-1])  # of the same size
    os.utime(folder / name, ns=(1, 1))
    assert Adapters().identity(request(folder)) not in ("", None, before)
    assert adapters.identity(request(folder, number=2)) not in ("", None, before)


def test_changed_under_its_number(folder):
    """The engine still has the old weights, or has loaded the new ones: nobody knows."""
    adapters = Adapters()
    before = adapters.identity(request(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"retrained")
    assert adapters.identity(request(folder)) is None
    assert adapters.identity(request(folder)) is None
    after = adapters.identity(request(folder, load_inplace=True))
    assert after not in (None, before)
    assert adapters.identity(request(folder)) == after


def test_files_are_read_once(folder, monkeypatch):
    adapters = Adapters()
    one = adapters.identity(request(folder))
    monkeypatch.setattr("spectrumkv_hf.engines.adapters._digest", lambda files: pytest.fail("read again"))
    assert adapters.identity(request(folder)) == one


def test_weights_that_cannot_be_found(tmp_path):
    adapters = Adapters()
    for path in (tmp_path / "missing", "somebody/an-adapter-of-the-hub", "", tmp_path):
        assert adapters.identity(request(path)) is None
