"""The modules by name."""

from pathlib import Path
from typing import Any

from spectrumkv_hf.support.extras import required

MODULES = {"kv_divergence": "metric", "needle_recall": "metric", "kv_memory": "measurement"}
"""Name to the `module_type` of `evaluate.load`."""


def path_of(name: str) -> Path:
    """The folder that `evaluate.load` takes.

    Raises:
        ValueError: there is no such module.
    """
    if name not in MODULES:
        raise ValueError(f"there is no module {name!r}: choose from {', '.join(MODULES)}")
    return Path(__file__).parent / name


def load(name: str, config_name: str | None = None, **options: Any) -> Any:
    """An `evaluate.EvaluationModule` of this package, with no network.

    Args:
        name: A key of `MODULES`.
        config_name: Of the module; `kv_divergence` has "default" and "logits".
        options: Of `evaluate.load`, such as `keep_in_memory`, `num_process` and `process_id`.

    Raises:
        ValueError: there is no such module or configuration.
        ImportError: the package `evaluate` is missing; the message has the line that installs it.
    """
    path = path_of(name)
    evaluate = required("evaluate", f"the module {name}")
    return evaluate.load(str(path), config_name, module_type=MODULES[name], **options)
