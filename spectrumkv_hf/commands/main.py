"""The command `spectrumkv`: one subcommand a module, imported when it is called."""

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch
import transformers

from spectrumkv_hf.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "probe": ("spectrumkv_hf.commands.probe", "find out which tiers a model tolerates, and remember it"),
    "eval": ("spectrumkv_hf.commands.eval", "measure methods beside each other; `eval all` makes every table"),
    "lm-eval": ("spectrumkv_hf.commands.lm_eval", "run lm-eval's tasks over a compressed cache"),
}
"""Subcommand to the module that has it (`add_arguments(parser)`, `run(args)`) and a line of help."""


class Version(argparse.Action):
    """`--version`: what a report of a problem should name."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        below = [
            f"Python {platform.python_version()}",
            f"PyTorch {torch.__version__}",
            f"Transformers {transformers.__version__}",
        ]
        with suppress(metadata.PackageNotFoundError):
            below.append(f"Triton {metadata.version('triton')}")
        print(f"spectrumkv-hf {__version__} ({', '.join(below)})")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; problems that the user can mend end with a line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="spectrumkv", description="KV caches with a precision for each token")
    parser.add_argument("--version", action=Version, nargs=0, help="of this package and those it stands on")
    parser.add_argument(
        "command", choices=COMMANDS, help="; ".join(f"{name}: {line}" for name, (_, line) in COMMANDS.items())
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; `spectrumkv COMMAND --help`")
    chosen = parser.parse_args(argv)
    path, line = COMMANDS[chosen.command]
    own = argparse.ArgumentParser(prog=f"spectrumkv {chosen.command}", description=line)
    try:
        module = importlib.import_module(path)
        module.add_arguments(own)
        module.run(own.parse_args(chosen.arguments))
    except (ImportError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
