"""Every experiment of `spectrumkv eval` by name."""

from spectrumkv_hf.evaluation.experiment import Experiment
from spectrumkv_hf.evaluation.experiments.needles import Needles
from spectrumkv_hf.evaluation.experiments.variants import PERPLEXITIES

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        *PERPLEXITIES,
        Needles(),
    )
}
"""In the order in which `spectrumkv eval paper` runs them."""
