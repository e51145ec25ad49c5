"""Which token gets which tier: policies, and the importance by which they rank. Pure: no model, no cache."""

from spectrumkv_hf.policy.calibrated import Calibrated
from spectrumkv_hf.policy.policies import (
    DROPPED,
    FP16,
    INT1,
    INT2,
    INT3,
    INT4,
    INT8,
    POLICIES,
    TIERS,
    Adaptive,
    Balanced,
    Counts,
    DropScored,
    DropWindow,
    Greedy,
    Lossless,
    Policy,
    RandomTier,
    SinkProtect,
    Tier,
    TwoTier,
    UniformInt4,
    UniformInt8,
    exempt,
    get_policy,
    increments,
    lifted,
)

__all__ = [
    "DROPPED", "FP16", "INT1", "INT2", "INT3", "INT4", "INT8", "POLICIES", "TIERS", "Adaptive", "Balanced",
    "Calibrated", "Counts", "DropScored", "DropWindow", "Greedy", "Lossless", "Policy", "RandomTier", "SinkProtect",
    "Tier", "TwoTier", "UniformInt4", "UniformInt8", "exempt", "get_policy", "increments", "lifted",
]  # fmt: skip
