"""Packages that only some commands need, and how to install them: the one place that knows.

This project is not on a package index, so its extras are installed from a checkout.
"""

import importlib
from typing import Any


def _extra(name: str) -> str:
    return f"pip install -c constraints.txt '.[{name}]'"


INSTALL = {
    **dict.fromkeys(("accelerate", "gguf"), _extra("examples")),
    **dict.fromkeys(("bitsandbytes", "datasets", "evaluate", "hqq", "matplotlib", "optimum"), _extra("eval")),
    "fsspec": _extra("urls"),
    "lm_eval": _extra("lm-eval"),
    "nixl": _extra("nixl"),
    # Without dependencies, whose pins would replace this Transformers; these are what its import needs.
    "kvpress": f"{_extra('eval')} && pip install --no-deps kvpress==0.5.5 'cachetools<6' fire termcolor",
}
"""Top-level module to the command that installs it, in a checkout of this project."""


def missing(module: str, purpose: str, problem: object = "not installed") -> ImportError:
    """The error that says which package `purpose` needs, and the command that installs it."""
    name = module.partition(".")[0]
    return ImportError(
        f"{purpose} needs the package {name} ({problem}). In a checkout of this project run\n    {INSTALL[name]}"
    )


def required(module: str, purpose: str) -> Any:
    """An optional module, imported.

    Args:
        module: Its name; the part before the first dot is a key of `INSTALL`.
        purpose: What needs it, as the subject of a sentence.

    Raises:
        ImportError: it is not there, or can't be imported; the message has the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise missing(module, purpose, problem) from problem
