"""`spectrumkv lm-eval`: lm-eval's tasks over the caches of several methods."""

import argparse
import json
import random
from contextlib import chdir, nullcontext
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrumkv_hf.evaluation.report.environment import environment
from spectrumkv_hf.evaluation.report.results import Cell, Results
from spectrumkv_hf.evaluation.report.tables import check_folders, print_table, shown
from spectrumkv_hf.evaluation.subjects.methods import Planned, Tiered, parse_method
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.support.extras import required

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from spectrumkv_hf.evaluation.subjects.lm_eval_model import SpectrumLM

POLICIES = ["exact", "sink_protect:0.5", "sink_protect:0.3"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="names of lm-eval's tasks or groups")
    parser.add_argument("--policy", nargs="+", default=POLICIES, metavar="SPEC", help=f"default: {' '.join(POLICIES)}")
    parser.add_argument("--recent-window", type=int, help="tokens kept exact at the end; default: the policy's")
    parser.add_argument("--chunk", type=int, help="tokens of a scored continuation in a forward; default: 128")
    parser.add_argument("--include-path", type=Path, help="folder with YAML files of further tasks")
    parser.add_argument(
        "--metadata", type=json.loads, help="JSON for tasks that take it, '{\"max_seq_lengths\": [4096]}'"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder with copies of the hub's data sets under their names there, such as DIR/openai/gsm8k; others come "
        "from the hub. Paths in --metadata are relative to it",
    )
    parser.add_argument("--limit", type=float, help="documents of each task, or a fraction of them below 1")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument("--num-fewshot", type=int, help="default: the task's")
    parser.add_argument("--max-length", type=int, help="tokens given to the model at most; default: its maximum")
    parser.add_argument("--max-gen-toks", type=int, help="tokens generated at most; default: the task's")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws for standard errors; 0: none; default: 1000")
    parser.add_argument("--apply-chat-template", action="store_true", help="prompts as messages of a chat")
    parser.add_argument("--output", type=Path, help="JSON file; what it has already is not measured again")


def run(args: argparse.Namespace) -> None:
    """Measure every task with every method, write the results and show them.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task or method, or arguments that don't fit the model.
    """
    required("lm_eval", "spectrumkv lm-eval")
    check_folders(args.output)
    for spec in args.policy:
        parse_method(spec, args.recent_window)
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise ValueError(f"there is no folder {args.data_dir}")
    with TemporaryDirectory() as words:  # RULER's tasks load the tokenizer by a name, and not every model has one
        tasks = task_manager(args.tasks, args.include_path, {"tokenizer": words} | (args.metadata or {}))
        model, tokenizer = load_from(args)
        if tokenizer is None:
            raise ValueError(f"model {args.model!r} has random weights and no tokenizer, which tasks need")
        tokenizer.save_pretrained(words)
        measure_tasks(args, tasks, model, tokenizer)


def measure_tasks(
    args: argparse.Namespace, tasks: "TaskManager", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What `run` does once everything is loaded.

    Raises:
        ValueError: arguments that don't fit the model, or results of other settings.
    """
    from spectrumkv_hf.evaluation.subjects.lm_eval_model import CHUNK, SpectrumLM

    chunk = CHUNK if args.chunk is None else args.chunk
    depends = ("model", "recent_window", "limit", "batch_size", "num_fewshot", "max_length", "bootstrap", "load_in")
    settings = {name: getattr(args, name) for name in (*depends, "metadata", "max_gen_toks")}
    settings |= {"chunk": chunk, "chat_template": args.apply_chat_template}
    results = Results(args.output, settings, environment(model) | {"lm-eval": metadata.version("lm-eval")})
    rows: list[tuple[str, ...]] = []
    warnings: list[str] = []

    @cache  # all methods get the same documents, which some of RULER's tasks draw anew each time
    def loaded(task: str) -> "list[Task | Group]":
        return load_task(tasks, task, args.data_dir)

    for task in args.tasks:
        for spec in args.policy:

            def measure(task: str = task, spec: str = spec) -> Cell:
                given = {"tokenizer": tokenizer, "batch_size": args.batch_size, "max_length": args.max_length}
                lm = SpectrumLM(model, spec, args.recent_window, chunk, **given)
                return evaluate(lm, loaded(task), tasks, args)

            cell = results.cell(f"{task} {spec}", measure)
            rows += _rows(spec, cell)
            if cut := cell["cache"].get("cut", 0):
                length = args.max_length or "the model's maximum"
                warnings.append(
                    f"{task} with {spec}: {cut} prompts were longer than --max-length ({length}) and lost their "
                    "beginning. Where that held what is asked for, the value says nothing"
                )
            if _stayed_exact(spec, cell):
                warnings.append(
                    f"{task} with {spec}: no token was read from a compressed cache. Prompts below about 130 tokens "
                    "stay exact, with --recent-window 0 those below 65"
                )
    print_table(("task", "metric", "method", "value", "± standard error", "times smaller", "actual ratio"), rows)
    for warning in warnings:  # below the table, where they are seen
        print(f"warning: {warning}")


def task_manager(names: list[str], folder: Path | None, task_metadata: dict[str, Any] | None) -> "TaskManager":
    """Where lm-eval looks tasks up: in `folder` alone where it has all of them, else also in its own collection.

    Raises:
        ValueError: there is no such folder or task.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    folder = folder and folder.resolve()  # tasks are read later, maybe from another current folder
    for with_defaults in (False, True) if folder else (True,):  # reading all of lm-eval's tasks takes seconds
        tasks = TaskManager(
            include_path=str(folder) if folder else None, include_defaults=with_defaults, metadata=task_metadata
        )
        unknown = [name for name in names if name not in tasks.all_tasks]
        if not unknown:
            return tasks
    where = f"lm-eval or {folder}" if folder else "lm-eval"
    raise ValueError(f"no task {', '.join(unknown)} in {where}; `lm-eval ls tasks` shows what there is")


def load_task(tasks: "TaskManager", name: str, data: Path | None) -> "list[Task | Group]":
    """A task or group with its documents; `data`: where data sets lie by their names on the hub, if anywhere.

    `datasets` takes a folder by the name of a data set for a copy of it, where there is one in the current folder.

    Raises:
        ValueError: a data set is neither there nor on the hub, or can't be read.
    """
    random.seed(0)  # as lm-eval does before it loads tasks
    np.random.seed(1234)
    with chdir(data) if data else nullcontext():
        found = tasks.load([name])
    return [found["groups"][name]] if name in found.get("groups", {}) else [*found["tasks"].values()]


def evaluate(lm: "SpectrumLM", loaded: "list[Task | Group]", tasks: "TaskManager", args: argparse.Namespace) -> Cell:
    """Results of what `load_task` returned: metrics by the name of a task or subtask, and what the caches held."""
    from lm_eval import simple_evaluate

    limit = args.limit if args.limit is None or args.limit < 1 else int(args.limit)
    got = simple_evaluate(
        lm,
        tasks=loaded,
        task_manager=tasks,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        limit=limit,
        bootstrap_iters=args.bootstrap,
        gen_kwargs=None if args.max_gen_toks is None else {"max_gen_toks": args.max_gen_toks},
        apply_chat_template=args.apply_chat_template,
        log_samples=False,
    )
    return {
        "metrics": {
            name: {key: value for key, value in metrics.items() if isinstance(value, float | int)}
            for name, metrics in got["results"].items()
        },
        "samples": {name: counts["effective"] for name, counts in got["n-samples"].items()},
        "versions": got["versions"],
        "num_fewshot": got["n-shot"],
        "cache": lm.use.summary(),
    }


def _stayed_exact(spec: str, cell: Cell) -> bool:
    """Whether nothing that was measured says anything about the policy, because its tiers stayed empty."""
    method = parse_method(spec)
    tiered = isinstance(method, Planned) or (isinstance(method, Tiered) and not method.policy.lossless)
    return tiered and cell["cache"]["nominal_ratio"] in (0, 1)


def _rows(spec: str, cell: Cell) -> list[tuple[str, ...]]:
    """A line for every metric, with its standard error where there is one."""
    rows: list[tuple[str, ...]] = []
    for name, metrics in cell["metrics"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or (metric.isdecimal() and value == -1):
                continue  # -1: RULER's tasks, of a length that was not asked for
            error = metrics.get(f"{metric}_stderr,{kind}")
            title = metric if kind == "none" else f"{metric} ({kind})"
            smaller = shown(cell["cache"].get("times_smaller"), ".2f")  # older results lack it
            actual = f"{cell['cache']['actual_ratio']:.3f}"
            rows.append((name, title, spec, f"{value:.4f}", shown(error, ".4f"), smaller, actual))
    return rows
