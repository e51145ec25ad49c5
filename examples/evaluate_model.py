"""What others report of a compressed cache, for one model: the steps of a config, each a command of this project.

python examples/evaluate_model.py --model meta-llama/Llama-3.1-8B-Instruct --output results/llama-3.1-8b
python examples/evaluate_model.py --model Qwen/Qwen3-8B --output results/qwen3-8b --list    # what would run
python examples/evaluate_model.py --dry-run --output dry    # the same steps at tiny sizes: minutes on a CPU

What is done is not run again; a step that was cut off goes on, as far as its own results resume.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from spectrumkv_hf.evaluation.subjects.models import SMOLLM2
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.whole_file import write_whole

ROOT = Path(__file__).parents[1]
LONGBENCH = "Xnhyacinth/LongBench"
"""Where lm-eval's tasks find LongBench on the hub."""


class Step(NamedTuple):
    """A command, its name and how long it takes by estimate, for the model that the config is made for."""

    name: str
    words: list[str]
    minutes: float


def steps_of(args: argparse.Namespace) -> Iterator[Step]:
    """The config's steps with the values of the arguments.

    Raises:
        ValueError: a command names a value that there is none of.
    """
    config = tomllib.loads(args.config.read_text(encoding="utf-8"))
    text = f"--text-file {shlex.quote(str(args.text_file))}" if args.text_file else ""
    data = f"--data-dir {shlex.quote(str(args.data_dir))}" if args.data_dir else ""
    if args.dry_run:
        text, data = "--dataset passage", f"--data-dir {shlex.quote(str(args.output / 'data'))}"
    values = config["full"] | (config["dry"] if args.dry_run else {})
    values |= {"model": shlex.quote(args.model), "text": text, "data": data, "output": shlex.quote(str(args.output))}
    for step in config["steps"]:
        for each in values[step["each"]].split() if "each" in step else [""]:
            try:
                command = Template(step["command"]).substitute(values, each=each)
            except KeyError as name:
                raise ValueError(
                    f"{args.config}: step {step['name']} names ${name.args[0]}, which is not set"
                ) from None
            yield Step("-".join(filter(None, (step["name"], each))), shlex.split(command), step["minutes"])


def dry_data(folder: Path) -> None:
    """Data sets of a few made-up rows, in the hub's format and layout, for the dry run's tasks."""
    context = " ".join(passage().split()[:80])
    row = {"context": context, "question": "What pulls?", "answers": ["the Moon"], "all_classes": None, "length": 80}
    question = {"question": "Two tides come, then two more. How many are there?", "answer": "2 + 2 = 4\n#### 4"}
    sets: dict[str, dict[str, dict[str, Any]]] = {
        LONGBENCH: {"2wikimqa_e": {"test": row}, "lcc_e": {"test": row}},
        "openai/gsm8k": {"main": {"train": question, "test": question}},
    }
    for name, configs in sets.items():
        at = folder / name
        at.mkdir(parents=True, exist_ok=True)
        card = ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, content in splits.items():
                card += [f"  - split: {split}", f"    path: {config}-{split}.jsonl"]
                (at / f"{config}-{split}.jsonl").write_text(json.dumps(content) + "\n", encoding="utf-8")
        (at / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def executed(words: list[str], output: Path) -> bool:
    """Run a command of this project from wherever; what it prints is shown, and kept in `output`."""
    program, *arguments = words
    start = ["-m", "spectrumkv_hf.commands.main"] if program == "spectrumkv" else [str(ROOT / arguments.pop(0))]
    with output.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *start, *arguments], stdout=file)
    print(output.read_text(encoding="utf-8"), flush=True)
    return done.returncode == 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub id or path; in a dry run {SMOLLM2!r} by default")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results, and what was printed")
    parser.add_argument("--config", type=Path, default=ROOT / "examples/evaluate_8b.toml", help="the steps")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps by name; default: all")
    parser.add_argument("--text-file", type=Path, help="held-out text; default: WikiText-2's test part, from the hub")
    parser.add_argument("--data-dir", type=Path, help="copies of the hub's data sets, see spectrumkv lm-eval")
    parser.add_argument("--list", action="store_true", help="show the commands and what they take, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="the config's tiny sizes, over texts made up here")
    args = parser.parse_args()
    if args.model is None and not args.dry_run:
        parser.error("--model is required, but for a dry run")
    args.model = args.model or SMOLLM2
    return args


def main() -> None:
    args = parse_args()
    try:
        steps = list(steps_of(args))
    except (OSError, ValueError, KeyError) as problem:
        print(f"error: {args.config}: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    if unknown := {*(args.only or ())} - {step.name for step in steps}:
        print(f"error: no step {', '.join(sorted(unknown))}: {', '.join(step.name for step in steps)}", file=sys.stderr)
        raise SystemExit(2)
    steps = [step for step in steps if not args.only or step.name in args.only]
    if args.list:
        for step in steps:
            print(f"# {step.name}, about {step.minutes:g} minutes by estimate\n{shlex.join(step.words)}")
        print(f"# all: about {sum(step.minutes for step in steps) / 60:.1f} hours by estimate")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        dry_data(args.output / "data")
    record = args.output / "done.json"
    done = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    failed = []
    for step in steps:
        if done.get(step.name, {}).get("command") == shlex.join(step.words):
            print(f"{step.name}: done before")
            continue
        print(f"{step.name}: {shlex.join(step.words)}", flush=True)
        started = time.perf_counter()
        if not executed(step.words, args.output / f"{step.name}.txt"):
            failed.append(step.name)
            continue
        seconds = round(time.perf_counter() - started)
        done[step.name] = {"command": shlex.join(step.words), "seconds": seconds}
        write_whole(record, json.dumps(done, indent=1))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
