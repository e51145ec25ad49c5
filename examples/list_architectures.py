"""Which decoders of the installed Transformers get tiers, by their default configs: prints a Markdown table."""

import argparse
import importlib
import logging
from collections import Counter, defaultdict

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.tiered.layer import SpectrumLayer


def untiered() -> tuple[int, dict[str, list[str]]]:
    """How many architectures there are, and of those without a tiered layer the model types by the reason."""
    seen: set[type] = set()
    reasons: dict[str, list[str]] = defaultdict(list)
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
            importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))  # registers layers
            config.is_encoder_decoder = False
            cache = SpectrumCache(config)
        except Exception:  # no config without arguments, or none that has a cache
            continue
        if type(config) in seen:  # a text model and the whole that it is part of
            continue
        seen.add(type(config))
        if not any(isinstance(layer, SpectrumLayer) for layer in cache.layers):
            notes = Counter(line.split(": ", 1)[1] for line in cache.summary().splitlines())
            reasons["; ".join(sorted(notes))].append(model_type)
    return len(seen), dict(reasons)


def parse_args() -> argparse.Namespace:
    return argparse.ArgumentParser(description=__doc__).parse_args()


def main() -> None:
    parse_args()
    logging.disable(logging.WARNING)
    count, reasons = untiered()
    print(
        f"Transformers {transformers.__version__}: {sum(map(len, reasons.values()))} of {count} have no tiered layer\n"
    )
    print("| why | model types |\n|---|---|")
    for reason, model_types in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"| {reason} | {', '.join(f'`{name}`' for name in sorted(model_types))} |")


if __name__ == "__main__":
    main()
