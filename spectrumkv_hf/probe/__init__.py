"""AutoProbe: finds out which tiers a model tolerates, once, and remembers it.

`calibration` and `paper` measure, `verdict` holds what they found and names policies, `auto` runs a probe once a model,
`storage` keeps verdicts on disk. `passage`, `divergence` and `needles` are what they measure with: a text, distances of
predictions, and a task. The evaluation measures with them too.
"""

from spectrumkv_hf.probe.auto import PROBES, probe_model
from spectrumkv_hf.probe.calibration import CalibrationProbe, ProbeError
from spectrumkv_hf.probe.paper import PaperProbe
from spectrumkv_hf.probe.verdict import CalibrationVerdict, LayerError, PaperVerdict, TierReport, Trial

__all__ = [
    "PROBES",
    "CalibrationProbe",
    "CalibrationVerdict",
    "LayerError",
    "PaperProbe",
    "PaperVerdict",
    "ProbeError",
    "TierReport",
    "Trial",
    "probe_model",
]
