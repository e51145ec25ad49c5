"""What the README promises of an installed package, tried where nothing but its declared dependencies is there.

`make dist` runs this with the Python of an empty environment, in which the wheel was installed.
"""

import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spectrumkv_hf
import spectrumkv_kernels
from spectrumkv_hf import SpectrumCache, cache_argument


def check(name, holds):
    """End with an error that names what does not hold; plain `assert` is gone under -O."""
    if not holds:
        sys.exit(f"does not hold of the installed package: {name}")
    print(f"  {name}")


def command(*arguments):
    program = Path(sys.executable).with_name("spectrumkv")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def main():
    for package in (spectrumkv_hf, spectrumkv_kernels):
        place = Path(package.__file__)
        check(f"{package.__name__} is the installed one", place.is_relative_to(sys.prefix))
        check(f"{package.__name__} is typed", resources.files(package).joinpath("py.typed").is_file())
    version = metadata.version("spectrumkv-hf")
    check("one version everywhere", version == spectrumkv_hf.__version__)
    check("spectrumkv --version names it", command("--version").startswith(f"spectrumkv-hf {version} "))
    for arguments in ([], ["probe"], ["eval"], ["eval", "all"], ["lm-eval"]):
        words = " ".join(["spectrumkv", *arguments, "--help"])
        check(words, "usage:" in command(*arguments, "--help"))

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(3, 128, (1, 400)), "attention_mask": torch.ones(1, 400, dtype=torch.int64)}
    cache = SpectrumCache(config=model.config, budget=0.3)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**inputs, **cache_argument(cache), **settings)
    check("generate() over a SpectrumCache", output.shape == (1, 408))
    check("it is smaller than the exact cache", cache.memory().times_smaller > 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chat.kv")
        cache.save(path)
        loaded = SpectrumCache.load(path, config=model.config)
        check("a saved cache is the same when it is loaded", torch.equal(loaded.serialize(), cache.serialize()))


if __name__ == "__main__":
    main()
