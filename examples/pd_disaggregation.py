"""Prefill in one process, decode in another: the compressed cache goes between them, layer by layer.

python examples/pd_disaggregation.py --budget 0.3
torchrun --nproc-per-node 2 examples/pd_disaggregation.py --budget 0.3
python examples/pd_disaggregation.py --budget 0.3 --transport nixl  # with the extra of that name
head -c 32 /dev/urandom > key; python examples/pd_disaggregation.py --budget 0.3 --key-file key
"""

import argparse
import atexit
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from spectrumkv_hf import Policy, SpectrumCache, cache_argument, get_policy
from spectrumkv_hf.evaluation.report.environment import environment, settings_of
from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders, print_table
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.extras import missing
from spectrumkv_hf.support.whole_file import write_whole
from spectrumkv_hf.transfer import CacheReceiver, CacheSender, send_cache
from spectrumkv_hf.transfer.break_even import TransferCosts, choose_policy
from spectrumkv_hf.transfer.directory import DirectoryReceiver, DirectorySender
from spectrumkv_hf.transfer.transport import ReceivingTransport, SendingTransport
from spectrumkv_hf.wire.mac import check_key

PREFILL, DECODE = 0, 1
"""Ranks."""
TRANSPORTS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl", "file": "gloo", "nixl": "gloo"}
"""Transports of caches, and the backends of the process group, over which everything else goes."""


@dataclass
class Sent:
    """What the prefill side did for a request; times by `time.monotonic()`, which processes of a machine share.

    Attributes:
        first_token: That prefill gave, exact.
        tokens: Of the prompt.
        fp16_bytes: Of the exact cache at 16 bits an element.
        sent_bytes: That went over the link.
        started, prefilled, finished: When prefill began and ended, and when the receiver had acknowledged the cache.
        compressing: Seconds of prefill that went into ranking and compressing.
        sending: Seconds from the first frame to the last, waiting for layers included.
    """

    first_token: float = 0.0
    tokens: float = 0.0
    fp16_bytes: float = 0.0
    sent_bytes: float = 0.0
    started: float = 0.0
    prefilled: float = 0.0
    finished: float = 0.0
    compressing: float = 0.0
    sending: float = 0.0


@dataclass
class Received:
    """What the decode side did for a request; `complete` and `first`: when cache and first token were there."""

    answer: list[int]
    complete: float
    receiving: float
    first: float
    policy: Policy


class Clock(LogitsProcessor):
    """Notes the time at which the first forward has given its logits, and leaves them as they are."""

    first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.first = self.first or time.monotonic()
        return scores


@contextmanager
def timed_compression(cache: SpectrumCache) -> Iterator[Callable[[], float]]:
    """Times the layers' ranking and compressing inside; gives a function that returns the seconds so far."""
    total = 0.0

    def timed(attended: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object) -> None:
            nonlocal total
            began = time.monotonic()
            attended(*args)
            total += time.monotonic() - began

        return call

    tiered = [layer for layer in cache.layers if hasattr(layer, "attended")]
    for layer in tiered:
        layer.attended = timed(layer.attended)
    try:
        yield lambda: total
    finally:
        for layer in tiered:
            del layer.attended


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: SpectrumCache, tokens: int, clock: Clock) -> list[int]:
    """`tokens` further ids after `ids`, `[1, length]`, greedily, over a cache with all or none of the ids before."""
    options = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache),
        max_new_tokens=tokens,
        logits_processor=[clock],
        **options,
    )
    return output[0, ids.shape[1] :].tolist()


def prefill_and_send(
    model: PreTrainedModel,
    ids: torch.Tensor,
    policy: Policy,
    streamed: bool,
    timeout: float,
    to: int | SendingTransport = DECODE,
    key: bytes | None = None,
) -> Sent:
    """Prefill `ids`, `[1, tokens]`, send the cache to the decode rank, and then the first token with the times."""
    cache = SpectrumCache(model.config, policy=policy)
    sent = Sent(tokens=ids.shape[1], started=time.monotonic())
    with timed_compression(cache) as compressing:
        if streamed:
            with CacheSender(cache, to, timeout=timeout, key=key) as sender:
                (sent.first_token,) = generate(model, ids, cache, 1, Clock())
                sent.prefilled = time.monotonic()
            report = sender.report
        else:
            (sent.first_token,) = generate(model, ids, cache, 1, Clock())
            sent.prefilled = time.monotonic()
            report = send_cache(cache, to, timeout=timeout, key=key)
    sent.finished = time.monotonic()
    sent.compressing, sent.sending, sent.sent_bytes = compressing(), report.seconds, report.bytes
    sent.fp16_bytes = cache.memory().fp16
    dist.send(torch.tensor(astuple(sent), dtype=torch.float64), DECODE)
    return sent


def receive_and_decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    new_tokens: int,
    timeout: float,
    prefill_timeout: float,
    source: int | ReceivingTransport = PREFILL,
    key: bytes | None = None,
) -> tuple[Sent, Received]:
    """Receive the cache of `ids`, `[1, tokens]`, and generate the rest of the answer over it."""
    options = {"timeout": timeout, "first_timeout": prefill_timeout, "device": model.device, "key": key}
    receiver = CacheReceiver(source, model.config, **options)
    cache = receiver.receive()
    complete = time.monotonic()
    numbers = torch.empty(len(fields(Sent)), dtype=torch.float64)
    dist.recv(numbers, PREFILL)
    sent = Sent(*numbers.tolist())
    first = torch.tensor([[int(sent.first_token)]], device=ids.device)
    clock = Clock()
    rest = generate(model, torch.cat((ids, first), dim=1), cache, new_tokens - 1, clock)
    assert clock.first is not None
    answer = [int(sent.first_token), *rest]
    return sent, Received(answer, complete, receiver.report.seconds, clock.first, cache.policy)


def prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, lengths: list[int]
) -> list[torch.Tensor]:
    """Ids `[1, length]` from the passage, each from another place in it, repeated where it is too short.

    Of a model with random weights, which has no tokenizer, they are random, and the same in both processes.
    """
    if tokenizer is None:
        size, draw = model.config.get_text_config(decoder=True).vocab_size, torch.Generator().manual_seed(0)
        return [torch.randint(size, (1, length), generator=draw) for length in lengths]
    once = tokenizer(passage(), return_tensors="pt", verbose=False).input_ids[0]
    repeated = once.repeat(1 + -(-max(lengths) // len(once)))
    starts = [index * 97 % len(once) for index in range(len(lengths))]
    return [repeated[start : start + length][None] for start, length in zip(starts, lengths, strict=True)]


def row_of(sent: Sent, received: Received) -> dict[str, float]:
    """A request in numbers: bytes, seconds."""
    return {
        "tokens": int(sent.tokens),
        "fp16_bytes": int(sent.fp16_bytes),
        "sent_bytes": int(sent.sent_bytes),
        "prefill_seconds": sent.prefilled - sent.started,
        "compress_seconds": sent.compressing,
        "send_seconds": sent.sending,
        "receive_seconds": received.receiving,
        "exposed_seconds": received.complete - sent.prefilled,
        "first_token_seconds": received.first - sent.started,
    }


def as_machines(rank: int, interface: str) -> dict[str, str]:
    """Environment in which NCCL takes the two processes for two machines, with nothing but a network between them."""
    return {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": interface, "NCCL_IB_DISABLE": "1"}


def join(args: argparse.Namespace, rank: int, address: str) -> None:
    """Join the process group of the two."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=args.timeout)
    if args.transport == "nccl":
        devices = torch.cuda.device_count()
        torch.cuda.set_device(rank % devices)
        if devices == 1:  # NCCL refuses two processes on one GPU of a machine
            os.environ.update(as_machines(rank, os.environ.get("NCCL_SOCKET_IFNAME", "lo")))
    dist.init_process_group(TRANSPORTS[args.transport], init_method=address, rank=rank, world_size=2, timeout=limit)


def sender_of(args: argparse.Namespace) -> int | SendingTransport:
    """What leads to the decode rank, which says where it waits."""
    if args.transport == "file":
        return DirectorySender(receive_text())
    if args.transport == "nixl":
        from spectrumkv_hf.transfer.nixl import NixlSender

        host, port = receive_text().split()
        return NixlSender(host, int(port), args.timeout)
    return DECODE


def receiver_of(args: argparse.Namespace) -> int | ReceivingTransport:
    """What leads to the prefill rank, once that knows where to send."""
    if args.transport == "file":
        folder = tempfile.mkdtemp(prefix="spectrumkv-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        send_text(folder)
        return DirectoryReceiver(folder)
    if args.transport == "nixl":
        from spectrumkv_hf.transfer.nixl import NixlListener

        with NixlListener(args.host) as listener:
            send_text(f"{listener.address[0]} {listener.address[1]}")
            return listener.accept(args.timeout)
    return PREFILL


def key_of(args: argparse.Namespace) -> bytes | None:
    """The key of both processes, None without a file of it."""
    return check_key(args.key_file.read_bytes()) if args.key_file else None


def send_text(text: str) -> None:
    """To the prefill rank, in 256 bytes."""
    dist.send(torch.tensor(list(text.encode().ljust(256, b"\0")), dtype=torch.uint8), PREFILL)


def receive_text() -> str:
    """From the decode rank."""
    data = torch.empty(256, dtype=torch.uint8)
    dist.recv(data, DECODE)
    return bytes(data.tolist()).rstrip(b"\0").decode()


def run_prefill(args: argparse.Namespace) -> None:
    model, tokenizer = load_from(args)
    to = sender_of(args)
    policy = get_policy(args.policy, args.budget)
    for index, ids in enumerate(prompts(model, tokenizer, [args.tokens[0], *args.tokens])):
        dist.barrier()
        sent = prefill_and_send(model, ids.to(model.device), policy, args.streamed, args.timeout, to, key_of(args))
        if index == 0 and args.bandwidth and not policy.lossless:  # the warm-up tells what compressing costs
            costs = TransferCosts(
                fp16_bytes=int(sent.fp16_bytes),
                ratio=sent.sent_bytes / sent.fp16_bytes,
                prefill=sent.prefilled - sent.started - sent.compressing,
                compress=sent.compressing,
                layers=model.config.get_text_config(decoder=True).num_hidden_layers,
            )
            policy = choose_policy(args.bandwidth * 1e6 / 8, policy, costs, args.streamed)
            above = costs.break_even(args.streamed) * 8e-6
            print(f"compressing pays below {above:.0f} Mbit/s; for {args.bandwidth:g}: {policy.name}")
    dist.barrier()


def run_decode(args: argparse.Namespace) -> None:
    model, tokenizer = load_from(args)
    about, source = environment(model), receiver_of(args)
    answers, policies, rows, every = [], [], [], prompts(model, tokenizer, [args.tokens[0], *args.tokens])
    for ids in every:
        dist.barrier()
        sent, received = receive_and_decode(
            model, ids.to(model.device), args.max_new_tokens, args.timeout, args.timeout, source, key_of(args)
        )
        answers.append(received.answer)
        policies.append(received.policy)
        rows.append(row_of(sent, received))
    dist.barrier()
    equal = 0  # with random weights all tokens are about as likely, so the order of sums may decide
    for ids, answer, used in zip(every, answers, policies, strict=True):
        cache = SpectrumCache(model.config, policy=used)
        alone = generate(model, ids.to(model.device), cache, args.max_new_tokens, Clock())
        equal += alone == answer
        if alone != answer and tokenizer is not None:
            raise AssertionError(f"{ids.shape[1]} tokens: one process answers {alone}, two answer {answer}")
    del rows[0]  # warm-up
    policy, how = policies[-1], "streamed" if args.streamed else "whole"
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{args.model}, {policy.name} b={policy.budget:g}, {how}, {args.transport}")
    print(f"answers of {args.max_new_tokens} tokens equal those of one process: {equal} of {len(answers)}\n")
    print_table(
        ["tokens", "FP16 MB", "sent MB", "prefill s", "of it compress", "send s", "receive s", "exposed s", "TTFT s"],
        [
            [str(row["tokens"]), f"{row['fp16_bytes'] / 1e6:.1f}", f"{row['sent_bytes'] / 1e6:.1f}"]
            + [f"{value:.3f}" for key, value in row.items() if key.endswith("seconds")]
            for row in rows
        ],
    )
    print(
        "\nexposed: from the end of prefill until the decode side has the cache. TTFT: from the start of prefill to\n"
        "the first token that the decode side computes over the cache it received."
    )
    if args.json:
        report = {"environment": about, "settings": settings_of(args), "results": rows}
        write_whole(args.json, json.dumps(report, indent=2))


def work(rank: int, args: argparse.Namespace, address: str) -> None:
    """The process of one rank."""
    join(args, rank, address)
    (run_prefill if rank == PREFILL else run_decode)(args)
    dist.destroy_process_group()


def add_arguments(parser: argparse.ArgumentParser, transports: Iterable[str] = ("gloo", "nccl")) -> None:
    """Those that `limited_link.py` has too."""
    add_model_arguments(parser)
    parser.add_argument("--transport", choices=transports, default="gloo", help="how caches travel; file: a folder")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that any message may take")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_arguments(parser, TRANSPORTS)
    parser.add_argument("--host", default="127.0.0.1", help="address at which the decode side waits, for nixl")
    parser.add_argument("--policy", default="sink_protect", help="a policy of spectrumkv_hf.POLICIES")
    parser.add_argument("--budget", type=float, help="fraction of the FP16 bytes; default: the policy's own")
    parser.add_argument("--bandwidth", type=float, help="of the link, Mbit/s: send exact where compressing doesn't pay")
    parser.add_argument("--key-file", type=Path, metavar="PATH", help="16 to 64 random bytes: transfers have MACs")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048], help="lengths of the prompts")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="tokens of each answer")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--streamed", action="store_true", default=True, help="send layers while prefill runs (default)")
    how.add_argument("--whole", action="store_false", dest="streamed", help="send the cache after prefill")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        get_policy(args.policy, args.budget)
        check_folders(args.json)
        key_of(args)
        if min(args.tokens) < 1 or args.max_new_tokens < 2 or not args.timeout > 0:
            raise ValueError("--tokens are 1 or more, --max-new-tokens 2 or more, --timeout is positive")
        if args.transport == "nccl" and not torch.cuda.is_available():
            raise ValueError("--transport nccl needs a CUDA device, better two")
        if args.transport == "nixl" and not any(map(importlib.util.find_spec, ("nixl", "nixl_cu12", "nixl_cu13"))):
            raise missing("nixl", "--transport nixl")
    except (ImportError, OSError, TypeError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    if "RANK" in os.environ:  # by torchrun
        work(int(os.environ["RANK"]), args, "env://")
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 2, 1)))  # they share the cores
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of two processes on one terminal
    torch.multiprocessing.spawn(work, args=(args, f"tcp://127.0.0.1:{port}"), nprocs=2)


if __name__ == "__main__":
    main()
