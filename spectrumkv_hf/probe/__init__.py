"""AutoProbe: finds out which tiers a model tolerates, once, and remembers it.

`calibration`, `plan` and `paper` measure, `verdict` holds what they found and names policies, `auto` runs a probe once
a model, `storage` keeps verdicts on disk. What they measure with: `passage`, texts; `divergence`, of predictions;
`measurement`, caches that are recoded; `needles`, a task. The evaluation measures with them too.
"""

from spectrumkv_hf.probe.auto import PROBES, probe_model
from spectrumkv_hf.probe.calibration import CalibrationProbe
from spectrumkv_hf.probe.measurement import ProbeError
from spectrumkv_hf.probe.paper import PaperProbe
from spectrumkv_hf.probe.plan import PlanProbe
from spectrumkv_hf.probe.verdict import (
    CalibrationVerdict,
    LayerError,
    LayerPlan,
    PaperVerdict,
    PlanVerdict,
    TierReport,
    Trial,
)

__all__ = [
    "PROBES",
    "CalibrationProbe",
    "CalibrationVerdict",
    "LayerError",
    "LayerPlan",
    "PaperProbe",
    "PaperVerdict",
    "PlanProbe",
    "PlanVerdict",
    "ProbeError",
    "TierReport",
    "Trial",
    "probe_model",
]
