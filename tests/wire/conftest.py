import pytest
from every_tier import EveryTier, EveryTierAndDropped

from spectrumkv_hf import POLICIES


@pytest.fixture
def with_every_tier(monkeypatch):
    """Policies that senders and receivers know."""
    for policy in (EveryTier, EveryTierAndDropped):
        monkeypatch.setitem(POLICIES, policy.name, policy)
