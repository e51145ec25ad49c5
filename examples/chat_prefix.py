"""A chat that goes on in a new process: the first one stores the cache of a long context, the second one finds it.

python examples/chat_prefix.py --tokens 4096 --budget 0.25

The time to the first token of the answer is measured in the second process, beside that of a prefill of everything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pd_disaggregation import Clock
from transformers import PreTrainedModel

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.evaluation.report.environment import environment, settings_of
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders, print_table
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.whole_file import write_whole
from spectrumkv_hf.transfer.prefix_store import PrefixStore
from spectrumkv_kernels import DEFAULT_CODEC

QUESTION = "What pulls the water of the sea?"
KEY = "SPECTRUMKV_STORE_KEY"
"""Variable of the environment with the key, in hex digits: what stands in a command's line others can read."""


def prompts(tokenizer: Any, tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A context of so many tokens, and the same with a question behind it, `[1, tokens]` each.

    The context is the built-in passage, repeated as needed; without a tokenizer both are random.
    """
    if tokenizer is None:
        ids = torch.randint(3, vocabulary, (tokens + 16,), generator=torch.Generator().manual_seed(0))
        return ids[None, :tokens], ids[None]
    once = tokenizer(passage(), return_tensors="pt", verbose=False).input_ids[0]
    question = tokenizer(f"\n\n{QUESTION}\n", return_tensors="pt", add_special_tokens=False).input_ids[0]
    context = once.repeat(-(-tokens // len(once)))[:tokens]
    return context[None], torch.cat((context, question))[None]


def open_store(args: argparse.Namespace, model: PreTrainedModel) -> PrefixStore:
    key = os.environ.get(KEY)
    return PrefixStore(args.store, model, args.policy, args.budget, args.codec, key=bytes.fromhex(key) if key else None)


def answer(
    model: PreTrainedModel, ids: torch.Tensor, tokens: int, cache: Callable[[], SpectrumCache]
) -> tuple[float, list[int]]:
    """Seconds from asking for the cache to the first token's logits, and all tokens of the answer."""
    clock, started = Clock(), time.monotonic()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache()),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[clock],
    )
    assert clock.first is not None
    return clock.first - started, output[0, ids.shape[1] :].tolist()


def first_process(args: argparse.Namespace) -> None:
    """Prefill the context, and store its cache."""
    model, tokenizer = load_from(args)
    context, _ = prompts(tokenizer, args.tokens, model.config.get_text_config(decoder=True).vocab_size)
    store = open_store(args, model)
    cache = SpectrumCache(model.config, store.policy, codec=store.codec, model=model)
    with torch.no_grad():
        model(context.to(model.device), **cache_argument(cache), logits_to_keep=1)
    began = time.perf_counter()
    size = store.put(context, cache)
    print(
        f"first process: {context.shape[1]} tokens, {size / 1e6:.1f} MB stored in {time.perf_counter() - began:.3f} s"
    )


def second_process(args: argparse.Namespace) -> None:
    """Answer the question over the stored cache and over a cold prefill, in turn, and print what each took."""
    model, tokenizer = load_from(args)
    context, ids = prompts(tokenizer, args.tokens, model.config.get_text_config(decoder=True).vocab_size)
    ids = ids.to(model.device)
    store = open_store(args, model)

    def cold() -> SpectrumCache:
        return SpectrumCache(model.config, store.policy, codec=store.codec, model=model)

    def resumed() -> SpectrumCache:
        cache = store.get(ids)
        if cache is None or cache.get_seq_length() != context.shape[1]:
            raise RuntimeError(f"the context of {context.shape[1]} tokens was not found in {args.store}")
        return cache

    seconds: dict[str, list[float]] = {"cold prefill": [], "resumed": []}
    answers = {}
    for round in range(args.rounds + 1):  # the first one warms up
        for name, cache in (("cold prefill", cold), ("resumed", resumed)):
            took, answers[name] = answer(model, ids, args.max_new_tokens, cache)
            if round:
                seconds[name].append(took)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    about = environment(model)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{args.model}, {store.policy.name} b={store.policy.budget:g}, codec {store.codec}: {context.shape[1]} tokens "
        f"of context, {ids.shape[1] - context.shape[1]} of a question\n"
    )
    print_table(
        ["second process", "first token s", "least", "most", "of cold"],
        [
            [
                name,
                *(f"{v:.3f}" for v in (medians[name], min(each), max(each), medians[name] / medians["cold prefill"])),
            ]
            for name, each in seconds.items()
        ],
    )
    print(
        f"\nMedians of {args.rounds} rounds in turn after one that is not counted; a round's ratio was "
        f"{min(ratios):.3f} to {max(ratios):.3f}.\nResumed: finding, reading and checking the cache is in it."
    )
    same = answers["cold prefill"] == answers["resumed"]
    print(
        f"The answers of {args.max_new_tokens} tokens are {'the same' if same else 'not the same'}: a cold prefill "
        "reads the question over exact keys and\nvalues, the resumed one over tiers; with --policy fp16 both are exact."
    )
    if tokenizer is not None:
        print(f"{QUESTION} {tokenizer.decode(answers['resumed'], skip_special_tokens=True)!r}")
    if args.json:
        results = {"seconds": seconds, "medians": medians, "answers": answers}
        write_whole(args.json, json.dumps({"environment": about, "settings": settings_of(args), **results}, indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--store", help="folder or URL that stays; default: a folder that is removed at the end")
    parser.add_argument("--tokens", type=int, default=1024, help="of the context, 64 or more")
    parser.add_argument("--policy", default="sink_protect", help="a policy of spectrumkv_hf.POLICIES")
    parser.add_argument("--budget", type=float, help="fraction of the FP16 bytes; default: the policy's own")
    parser.add_argument("--codec", default=DEFAULT_CODEC, help="of the cache")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument("--process", type=int, choices=(1, 2), help="run this one only; default: one after the other")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        check_folders(args.json)
        if args.tokens < 64 or args.max_new_tokens < 1 or args.rounds < 1:
            raise ValueError("--tokens is 64 or more, --max-new-tokens and --rounds are 1 or more")
        if args.process and not args.store:
            raise ValueError("--process needs a --store that stays")
        if args.process:
            (first_process if args.process == 1 else second_process)(args)
            return
    except (ImportError, OSError, TypeError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    with tempfile.TemporaryDirectory(prefix="spectrumkv-") as folder:
        place = [] if args.store else ["--store", folder]
        for process in ("1", "2"):
            done = subprocess.run([sys.executable, *sys.argv, *place, "--process", process])
            if done.returncode:
                raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
