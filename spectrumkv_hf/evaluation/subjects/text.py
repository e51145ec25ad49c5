"""Held-out text, and windows of its tokens."""

import argparse
import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.extras import required

DATASET = "Salesforce/wikitext:wikitext-2-raw-v1:test"
PASSAGE = "passage"


def dataset_text(name: str) -> str:
    """The text of a dataset, its rows joined as they are.

    Args:
        name: `PATH[:CONFIG[:SPLIT]]` for `datasets.load_dataset`, of which the column `text` is taken, or `passage`.

    Raises:
        ValueError: the dataset has no such column, or too many fields are given.
        ImportError: the package `datasets` is missing.
    """
    if name == PASSAGE:
        return passage()
    path, *rest = name.split(":")
    if len(rest) > 2:
        raise ValueError(f"dataset {name!r}: write PATH[:CONFIG[:SPLIT]]")
    load_dataset = required("datasets", f"dataset {name!r} (--text-file and --dataset {PASSAGE} don't)").load_dataset
    config, split = (*rest, "", "")[:2]
    rows = load_dataset(path, config or None, split=split or "test")
    if "text" not in rows.column_names:
        raise ValueError(f"dataset {name!r} has no column 'text', but {', '.join(rows.column_names)}")
    return "".join(rows["text"])


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `text_from` reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--text-file", type=Path, help="held-out text, UTF-8")
    group.add_argument(
        "--dataset",
        default=DATASET,
        metavar="PATH[:CONFIG[:SPLIT]]",
        help=f"of the Hugging Face Hub or a folder, column 'text'; or {PASSAGE!r}, a text on tides in this package",
    )


def text_from(args: argparse.Namespace) -> str:
    """The text that the arguments of `add_text_arguments` name.

    Raises:
        OSError: the file can't be read, or the dataset is not there.
        ImportError: a dataset is named and the package `datasets` is missing.
        ValueError: as `dataset_text`, or the file is no UTF-8.
    """
    return args.text_file.read_text(encoding="utf-8") if args.text_file else dataset_text(args.dataset)


def text_label(args: argparse.Namespace, text: str) -> str:
    """What names a text beside results: the file without its folder, or the dataset, and a digest of the contents."""
    name = args.text_file.name if args.text_file else args.dataset
    return f"{name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int = 1) -> list[torch.Tensor]:
    """The first `count` non-overlapping windows of `length` tokens, `[1, length]` each.

    Every window starts with the token that the tokenizer begins a text with, if any.

    Raises:
        ValueError: the text is too short for them.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    start = ids[:1] if len(ids) and ids[0] == tokenizer.bos_token_id else ids[:0]
    windows = ids[len(start) :].split(length - len(start))
    whole = [torch.cat((start, w))[None] for w in windows if len(start) + len(w) == length]
    if len(whole) < count:
        raise ValueError(f"the text has {len(ids)} tokens: {len(whole)} windows of {length}, {count} wanted")
    return whole[:count]
