"""Which methods each table of quality on a continuation compares."""

from spectrumkv_hf.evaluation.experiments.perplexity import Perplexity
from spectrumkv_hf.evaluation.report import figures

QUICK = {"dataset": "passage", "contexts": [256], "continuation": 64, "windows": 1}
SINKS = (0, 1, 4, 16)
DECAYS = (0.0, 0.0001, 0.001, 0.01)
RANKINGS = ("attention", "attention_value", "kv_norm", "positional", "recency", "random")

PERPLEXITIES = (
    Perplexity(
        name="perplexity",
        title="Quality of a continuation over the cache",
        about="Exact prefill, the cache as it is stored, the same continuation tokens for every method. KL is to "
        "the exact cache; ± are standard errors over the windows; actual counts all stored bytes, and exact "
        "tokens of a float32 model twice.",
        draw=figures.dots,
        methods=(
            "sink_protect:0.5",
            "sink_protect:0.3",
            "sink_protect:0.3::attention_value",
            "sink_protect:0.25",
            "sink_protect:0.25:spectrum",
            "calibrated:0.3",
            "calibrated:0.25",
            "calibrated:0.2",
            "balanced:0.5",
            "two_tier:0.3",
            "random:0.3",
            "uniform_int8",
            "uniform_int4",
            "paper_greedy:0.5",
            "paper_sink_protect:0.5",
            "paper_balanced:0.5",
            "paper_greedy:0.3",
            "paper_sink_protect:0.3",
            "paper_balanced:0.3",
            "paper_two_tier:0.3",
            "paper_random:0.3",
            "paper_uniform_int8",
            "paper_uniform_int4",
            "drop_window:0.5",
            "drop_scored:0.5",
            "drop_window:0.3",
            "drop_scored:0.3",
        ),
        reduced=QUICK
        | {
            "windows": 2,
            "methods": ["sink_protect:0.5", "sink_protect:0.3", "paper_greedy:0.3", "random:0.3", "drop_scored:0.3"],
        },
    ),
    Perplexity(
        name="budget-sweep",
        title="Quality against stored bytes",
        about="The paper's budget curves, over stored bytes where the paper has nominal budgets.",
        draw=figures.against_bytes,
        methods=(
            *("uniform_int8", "uniform_int4", "paper_uniform_int8", "paper_uniform_int4"),
            *("calibrated:0.15", "calibrated:0.2"),
        ),
        families=(
            "sink_protect",
            "calibrated",
            "balanced",
            "random",
            "paper_greedy",
            "paper_balanced",
            "drop_window",
            "drop_scored",
        ),
        budgets=(0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.75),
        windows=5,
        reduced=QUICK | {"methods": [], "families": ["sink_protect", "paper_greedy"], "budgets": [0.3, 0.5]},
    ),
    Perplexity(
        name="context-length",
        title="Quality by length of context",
        about="The paper's table of longer contexts.",
        draw=figures.against_context,
        methods=("sink_protect:0.5", "sink_protect:0.3", "paper_greedy:0.5", "paper_greedy:0.3", "drop_scored:0.3"),
        contexts=(512, 1024, 2048, 4096, 7168),
        windows=5,
        reduced=QUICK | {"methods": ["sink_protect:0.3", "paper_greedy:0.3"], "contexts": [128, 256]},
    ),
    Perplexity(
        name="sinks",
        title="Sinks kept exact",
        about="The paper's SinkProtect against Greedy: the first N tokens exact (0 is Greedy but for the rounding "
        "of counts).",
        draw=figures.dots,
        methods=tuple(
            f"{name}:sinks={sinks}"
            for name in ("sink_protect:0.3", "sink_protect:0.5", "paper_sink_protect:0.3")
            for sinks in SINKS
        ),
        reduced=QUICK | {"methods": [f"sink_protect:0.3:sinks={sinks}" for sinks in (0, 4)]},
    ),
    Perplexity(
        name="ranking",
        title="What tokens are ranked by, b=.3",
        about="The paper's ablation of importance. All rows of a codec store the same bytes.",
        draw=figures.dots,
        methods=(
            *(f"sink_protect:0.3::{ranking}" for ranking in RANKINGS),
            *(f"sink_protect:0.3::attention:{scope}" for scope in ("layer", "token")),
            *(f"random:0.3:seed={seed}" for seed in (1, 2)),
            *(f"paper_{name}" for name in ("greedy:0.3", "random:0.3", "greedy:0.4", "random:0.4")),
        ),
        reduced=QUICK | {"methods": [f"sink_protect:0.3::{ranking}" for ranking in ("attention", "random")]},
    ),
    Perplexity(
        name="uniform",
        title="One precision for all tokens against tiers at the same nominal budget",
        about="The paper's comparison with uniform precision. At b=.5 Greedy is uniform INT8, at b=.25 uniform INT4.",
        draw=figures.dots,
        methods=(
            *("uniform_int8", "greedy:0.5", "sink_protect:0.5", "balanced:0.5"),
            *("paper_uniform_int8", "paper_greedy:0.5", "paper_sink_protect:0.5", "paper_balanced:0.5"),
            *("uniform_int4", "greedy:0.25", "sink_protect:0.25", "two_tier:0.25", "drop_scored:0.25"),
            *("paper_uniform_int4", "paper_greedy:0.25", "paper_sink_protect:0.25", "paper_two_tier:0.25"),
        ),
        reduced=QUICK | {"methods": ["uniform_int4", "sink_protect:0.25", "two_tier:0.25"]},
    ),
    Perplexity(
        name="decay",
        title="Decay of importance with distance, b=.3",
        about="The paper's lambda, which it measured on an unmodified model.",
        draw=figures.dots,
        methods=tuple(f"sink_protect:0.3:decay={decay:g}" for decay in DECAYS),
        reduced=QUICK | {"methods": [f"sink_protect:0.3:decay={decay:g}" for decay in (0, 0.01)]},
    ),
)
