import pytest
import torch

from spectrumkv_kernels import attention_scores, decode, encode, operation, tiered_attention
from spectrumkv_kernels.dispatch import IMPLEMENTATIONS, VARIABLE

CPU = torch.device("cpu")
OPERATIONS = {f.__name__: f for f in (encode, decode, tiered_attention, attention_scores)}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("setting", [None, "", "torch"], ids=["unset", "empty", "torch"])
def test_torch_on_cpu(monkeypatch, setting, name):
    if setting is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, setting)
    assert operation(name, CPU) is OPERATIONS[name]


def test_variable_name():
    assert VARIABLE == "SPECTRUMKV_KERNELS"


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_on_a_device_without_own_implementation(monkeypatch, name):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert operation(name, torch.device("meta")) is OPERATIONS[name]


def test_unknown_implementation(monkeypatch):
    monkeypatch.setenv(VARIABLE, "no-such-thing")
    with pytest.raises(ValueError, match="no-such-thing") as raised:
        operation("decode", CPU)
    message = str(raised.value)
    assert VARIABLE in message
    assert all(choice in message for choice in IMPLEMENTATIONS)


def test_forced_implementation_falls_back_to_torch(monkeypatch):
    def own():
        pass

    monkeypatch.setitem(IMPLEMENTATIONS, "other", {"decode": own})
    monkeypatch.setenv(VARIABLE, "other")
    assert operation("decode", CPU) is own
    assert operation("encode", CPU) is encode


def test_unknown_operation(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(KeyError, match="no-such-operation"):
        operation("no-such-operation", CPU)
