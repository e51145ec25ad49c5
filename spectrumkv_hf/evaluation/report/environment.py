"""Versions and device, which stand beside every result."""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from spectrumkv_hf.version import __version__


def environment(model: PreTrainedModel) -> dict[str, str | int]:
    """Versions and device of a measurement, and how the model was run."""
    return {
        **versions(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a command as JSON takes them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def versions(device: torch.device) -> dict[str, str | int]:
    """Versions and device of a measurement."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "spectrumkv-hf": __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
