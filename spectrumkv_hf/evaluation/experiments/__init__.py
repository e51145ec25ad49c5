"""Every experiment of `spectrumkv eval` by name."""

from spectrumkv_hf.evaluation.experiments.access_skew import AccessSkew
from spectrumkv_hf.evaluation.experiments.experiment import Experiment
from spectrumkv_hf.evaluation.experiments.generation import Generation
from spectrumkv_hf.evaluation.experiments.layer_error import ReconstructionError
from spectrumkv_hf.evaluation.experiments.needles import Needles
from spectrumkv_hf.evaluation.experiments.paper_perplexity import PaperPerplexity
from spectrumkv_hf.evaluation.experiments.ruler import Ruler
from spectrumkv_hf.evaluation.experiments.ttft import Ttft
from spectrumkv_hf.evaluation.experiments.variants import PERPLEXITIES

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        *PERPLEXITIES,
        PaperPerplexity(),
        Needles(),
        Ruler(),
        Generation(),
        ReconstructionError(),
        AccessSkew(),
        Ttft(),
    )
}
"""In the order in which `spectrumkv eval all` runs them."""
