"""Time to first token over a link of limited rate, between two network namespaces of this machine.

sudo -E python examples/limited_link.py --json results/limited-link.json

A veth pair joins the namespaces; a token bucket (tc-tbf) on each end limits the rate. A prefill process runs in one
namespace, a decode process in the other. Needs Linux, root (CAP_NET_ADMIN and CAP_SYS_ADMIN), and ip and tc of
iproute2; without them it says so and measures nothing.
"""

import argparse
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pd_disaggregation import (
    DECODE,
    PREFILL,
    add_arguments,
    as_machines,
    join,
    prefill_and_send,
    prompts,
    receive_and_decode,
    row_of,
)
from tqdm import tqdm

from spectrumkv_hf import get_policy
from spectrumkv_hf.evaluation.report.environment import environment, settings_of
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders, print_table
from spectrumkv_hf.evaluation.subjects.models import load_from
from spectrumkv_hf.support.whole_file import write_whole
from spectrumkv_hf.transfer.break_even import TransferCosts

ADDRESSES = ("10.213.77.1", "10.213.77.2")
"""Of the prefill and the decode end of the link, a network of their own."""
PORTS = {"group": 29611, "probe": 29612}
BLOCK = 1 << 16

Case = tuple[str, float, bool]
"""Policy, budget, streamed."""


# -- the link ---------------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """What this machine lacks for the link, or None."""
    if sys.platform != "linux":
        return "network namespaces are a feature of Linux"
    tools = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if tools:
        return f"{' and '.join(tools)} not found: install iproute2"
    if os.geteuid() != 0:
        return "it needs root, to make network namespaces"
    return None


def run(*command: str) -> None:
    """Run a command; its own message is the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


class Link:
    """Two namespaces and the veth pair between them; `close` removes them, and with them what runs there."""

    def __init__(self) -> None:
        self.spaces = tuple(f"spectrumkv-{os.getpid()}-{side}" for side in ("prefill", "decode"))
        self.ends = tuple(f"skv{os.getpid() % 10**6}{side}" for side in "pd")
        try:
            for space in self.spaces:
                run("ip", "netns", "add", space)
            run("ip", "-n", self.spaces[0], "link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
            run("ip", "-n", self.spaces[0], "link", "set", self.ends[1], "netns", self.spaces[1])
            for space, end, address in zip(self.spaces, self.ends, ADDRESSES, strict=True):
                run("ip", "-n", space, "address", "add", f"{address}/24", "dev", end)
                run("ip", "-n", space, "link", "set", end, "up")
                run("ip", "-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def limit(self, rate: float) -> None:
        """Limit both directions to `rate` bytes per second, headers of the packets included."""
        burst = max(BLOCK, int(rate * 0.002))  # what the bucket must hold between two ticks of the kernel's clock
        queue = max(4 * burst, int(rate * 0.02))
        bucket = ("tbf", "rate", f"{8 * rate:.0f}bit", "burst", f"{burst}b", "limit", f"{queue}b")
        for space, end in zip(self.spaces, self.ends, strict=True):
            run("tc", "-n", space, "qdisc", "replace", "dev", end, "root", *bucket)

    def close(self) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


# -- the two processes ------------------------------------------------------------------------------------------------


class Process:
    """A worker in a namespace, which takes commands and gives results as lines of JSON."""

    def __init__(self, rank: int, link: Link, arguments: list[str]) -> None:
        self.name = ("prefill", "decode")[rank]
        inside = [sys.executable, __file__, *arguments, "--worker", str(rank)]
        quiet = {"TQDM_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", link.spaces[rank], *inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet, "GLOO_SOCKET_IFNAME": link.ends[rank], **as_machines(rank, link.ends[rank])},
        )

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} process ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(args: argparse.Namespace) -> None:
    """What a worker does: as the driver says, until it closes the pipe."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    rank = args.worker
    torch.set_num_threads(args.threads)
    model, tokenizer = load_from(args)
    (ids,) = prompts(model, tokenizer, [args.tokens])
    ids = ids.to(model.device)
    join(args, rank, f"tcp://{ADDRESSES[PREFILL]}:{PORTS['group']}")
    about = {"environment": environment(model), "layers": model.config.get_text_config(decoder=True).num_hidden_layers}
    print(json.dumps(about), file=results, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        dist.barrier()
        if command["do"] == "probe":
            outcome: dict[str, Any] = {"bandwidth": (send_plain if rank == PREFILL else take_plain)(command["bytes"])}
        elif rank == PREFILL:
            policy = get_policy(command["policy"], command["budget"])
            prefill_and_send(model, ids, policy, command["streamed"], args.timeout)
            outcome = {}
        else:
            outcome = row_of(*receive_and_decode(model, ids, 2, args.timeout, args.timeout))
        print(json.dumps(outcome), file=results, flush=True)


def send_plain(count: int) -> float:
    """Send `count` bytes over a plain TCP connection."""
    block = bytes(BLOCK)
    with socket.create_server((ADDRESSES[PREFILL], PORTS["probe"])) as server:
        connection, _ = server.accept()
        with connection:
            for _ in range(-(-count // BLOCK)):
                connection.sendall(block)
    return 0.0


def take_plain(count: int) -> float:
    """Take what `send_plain` sends; bytes per second from the first block on."""
    until = time.monotonic() + 30
    while True:
        try:
            connection = socket.create_connection((ADDRESSES[PREFILL], PORTS["probe"]), timeout=30)
            break
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    with connection:
        taken, began = len(connection.recv(BLOCK)), time.monotonic()
        first = taken
        while block := connection.recv(BLOCK):
            taken += len(block)
    return (taken - first) / (time.monotonic() - began)


@contextmanager
def running(args: argparse.Namespace) -> Iterator[tuple[Link, list[Process]]]:
    """The link and both processes, all gone afterwards, however that comes about."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    link = Link()
    processes: list[Process] = []
    try:
        processes += [Process(rank, link, sys.argv[1:]) for rank in (PREFILL, DECODE)]
        yield link, processes
    finally:
        for process in processes:
            process.close()
        link.close()


# -- measuring --------------------------------------------------------------------------------------------------------


def both(processes: list[Process], **command: Any) -> dict[str, Any]:
    """The decode side's result of a command for both."""
    for process in processes:
        process.tell(**command)
    for process in processes:
        outcome = process.result()
    return outcome


def cases(budgets: list[float]) -> list[Case]:
    """FP16, and at each budget tokens dropped or compressed."""
    found: list[Case] = [("fp16", 1.0, False), ("fp16", 1.0, True)]
    for budget in budgets:
        found += [("drop_scored", budget, False), ("sink_protect", budget, False), ("sink_protect", budget, True)]
    return found


def name_of(case: Case) -> str:
    policy, budget, streamed = case
    title = {"fp16": "FP16", "drop_scored": f"drop b={budget:g}"}.get(policy, f"SpectrumKV b={budget:g}")
    return f"{title}, {'streamed' if streamed else 'whole'}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cases at all rates, as a report that JSON can hold."""
    every = cases(args.budgets)
    with running(args) as (link, processes):
        about = [process.result() for process in processes][0]
        fast = both(processes, do="probe", bytes=1 << 28)["bandwidth"]
        for _ in range(2):  # the first is warm-up
            plain = both(processes, do="request", policy="fp16", budget=1.0, streamed=False)
        prefill, size = plain["prefill_seconds"], plain["sent_bytes"]
        report: dict[str, Any] = {
            **about,
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "settings": settings_of(args),
            "unlimited_bytes_per_second": fast,
            "prefill_seconds": prefill,
            "fp16_sent_bytes": size,
            "rates": [],
        }
        for policy, budget, streamed in every:  # warm-up: on a GPU kernels are compiled
            both(processes, do="request", policy=policy, budget=budget, streamed=streamed)
        if args.rates:
            rates = [1e6 / 8 * rate for rate in args.rates]
        else:
            rates = [size / (share * prefill) for share in args.transfer_over_prefill]
        with tqdm(total=len(rates) * args.repeats * len(every), desc="requests", disable=None) as bar:
            for rate in rates:
                link.limit(rate)
                measured = both(processes, do="probe", bytes=int(min(max(rate, 1 << 21), 1 << 28)))["bandwidth"]
                runs: dict[Case, list[dict[str, float]]] = {case: [] for case in every}
                load = []
                for _ in range(args.repeats):
                    for case in every:
                        policy, budget, streamed = case
                        runs[case].append(
                            both(processes, do="request", policy=policy, budget=budget, streamed=streamed)
                        )
                        load.append(os.getloadavg()[0])
                        bar.update()
                report["rates"].append(
                    {
                        "transfer_over_prefill": size / (rate * prefill),
                        "rate_bytes_per_second": rate,
                        "measured_bytes_per_second": measured,
                        "load_average": [min(load), max(load)],
                        "cases": [summarised(case, found) for case, found in runs.items()],
                    }
                )
                add_comparisons(report["rates"][-1])
                if args.json:  # what is measured is not lost
                    write_whole(args.json, json.dumps(report, indent=2))
    report["break_even"] = {str(budget): break_even(report, budget) for budget in args.budgets}
    return report


def summarised(case: Case, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the runs, and the lowest and highest TTFT."""
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    ttft = [run["first_token_seconds"] for run in runs]
    policy, budget, streamed = case
    spread = [min(ttft), max(ttft)]
    about = {"case": name_of(case), "policy": policy, "budget": budget, "streamed": streamed, "runs": len(runs)}
    return {**about, **medians, "first_token_lowest_and_highest": spread}


def add_comparisons(rate: dict[str, Any]) -> None:
    """TTFT against FP16's, and how much of its transfer a streamed cache hid behind prefill."""
    by_case = {(c["policy"], c["budget"], c["streamed"]): c for c in rate["cases"]}
    exact = by_case["fp16", 1.0, False]["first_token_seconds"]
    for (policy, budget, streamed), case in by_case.items():
        case["change_against_fp16"] = case["first_token_seconds"] / exact - 1
        if streamed:
            whole = by_case[policy, budget, False]["exposed_seconds"]
            case["hidden"] = 1 - case["exposed_seconds"] / whole


def break_even(report: dict[str, Any], budget: float) -> dict[str, Any]:
    """Bandwidth above which FP16 has the earlier first token: measured, and by `TransferCosts` from this run's costs.

    Measured is where the lines between neighbouring rates cross, over the logarithm of the bandwidth; None where the
    rates enclose no crossing.
    """
    found: dict[str, Any] = {}
    columns = {
        (case["policy"], case["budget"], case["streamed"]): [] for rate in report["rates"] for case in rate["cases"]
    }
    for rate in report["rates"]:
        for case in rate["cases"]:
            columns[case["policy"], case["budget"], case["streamed"]].append(case)
    bandwidths = [rate["measured_bytes_per_second"] for rate in report["rates"]]
    for streamed in (False, True):
        exact, ours = columns["fp16", 1.0, streamed], columns["sink_protect", budget, streamed]
        gains = [e["first_token_seconds"] - o["first_token_seconds"] for e, o in zip(exact, ours, strict=True)]
        crossing = None
        for (x, gain), (y, next_gain) in pairwise(sorted(zip(bandwidths, gains, strict=True))):
            if gain > 0 >= next_gain:
                crossing = math.exp(math.log(x) + math.log(y / x) * gain / (gain - next_gain))
        costs = TransferCosts(
            fp16_bytes=int(report["fp16_sent_bytes"]),
            ratio=ours[0]["sent_bytes"] / report["fp16_sent_bytes"],
            prefill=statistics.median(case["prefill_seconds"] for case in exact),
            compress=statistics.median(case["compress_seconds"] for case in ours),
            layers=report["layers"],
        )
        found["streamed" if streamed else "whole"] = {"measured": crossing, "model": costs.break_even(streamed)}
    return found


def show(report: dict[str, Any]) -> None:
    """The tables."""
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    settings = report["settings"]
    print(
        f"{settings['model']}, {settings['tokens']} tokens, prefill {report['prefill_seconds']:.2f} s, FP16 cache "
        f"{report['fp16_sent_bytes'] / 1e6:.1f} MB; medians of {settings['repeats']}"
    )
    print(f"link without limit: {mbit(report['unlimited_bytes_per_second'])} Mbit/s over a plain TCP connection\n")
    for rate in report["rates"]:
        low, high = rate["load_average"]
        print(
            f"link {mbit(rate['rate_bytes_per_second'])} Mbit/s (plain TCP: {mbit(rate['measured_bytes_per_second'])}),"
            f" FP16 transfer {rate['transfer_over_prefill']:.3g} x prefill; load average {low:.1f} to {high:.1f}"
        )
        print_table(
            [
                "",
                "sent MB",
                "prefill s",
                "of it compress",
                "exposed s",
                "hidden",
                "TTFT s",
                "lowest",
                "highest",
                "FP16",
            ],
            [
                [case["case"], f"{case['sent_bytes'] / 1e6:.1f}"]
                + [f"{case[f'{key}_seconds']:.2f}" for key in ("prefill", "compress", "exposed")]
                + [f"{case['hidden']:.0%}" if "hidden" in case else ""]
                + [f"{t:.2f}" for t in (case["first_token_seconds"], *case["first_token_lowest_and_highest"])]
                + [f"{case['change_against_fp16']:+.0%}"]
                for case in rate["cases"]
            ],
        )
        print()
    for budget, found in report["break_even"].items():
        for how, values in found.items():
            measured = "none within these rates" if values["measured"] is None else f"{mbit(values['measured'])} Mbit/s"
            print(f"break-even b={budget}, {how}: measured {measured}, by TransferCosts {mbit(values['model'])} Mbit/s")
    print(
        "\nexposed: from the end of prefill until the decode side has the cache; hidden: how much of it streaming\n"
        "saves. TTFT: from the start of prefill to the first token computed over the received cache."
    )


def mbit(bytes_per_second: float) -> str:
    return f"{8e-6 * bytes_per_second:.0f}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3], help="fractions of the FP16 bytes")
    parser.add_argument(
        "--transfer-over-prefill",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 1.0, 3.0, 10.0],
        help="rates of the link: time that FP16 takes over it, as a multiple of prefill",
    )
    parser.add_argument("--rates", nargs="+", type=float, metavar="MBIT", help="or in Mbit/s")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each process: prefill, transfer and decode share cores"
    )
    parser.add_argument("--repeats", type=int, default=3, help="requests of each kind at each rate")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(dtype="bfloat16")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker is not None:
        serve(args)
        return
    if lack := missing():
        print(f"skipped: no limited link can be made here: {lack}")
        return
    try:
        check_folders(args.json)
        if min(args.rates or args.transfer_over_prefill) <= 0:
            raise ValueError("--rates and --transfer-over-prefill are positive")
        for budget in args.budgets:
            get_policy("sink_protect", budget)
        report = measure(args)
    except (OSError, RuntimeError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    show(report)
    if args.json:
        write_whole(args.json, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
