"""Bytes per second of every transport between two processes of this machine, frames of random bytes.

python examples/bench_transports.py --transports gloo file nixl
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from spectrumkv_hf.evaluation.report.tables import HelpFormatter, print_table
from spectrumkv_hf.transfer.transport import (
    HEAD_BYTES,
    REPLY_BYTES,
    RankTransport,
    ReceivingTransport,
    SendingTransport,
)

TRANSPORTS = ("gloo", "file", "nixl")
TIMEOUT = 120.0


def connect(kind: str, folder: Path, pipe: Connection, sending: bool) -> SendingTransport | ReceivingTransport:
    """This process's end."""
    if kind == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        address, limit = f"file://{folder / 'group'}", timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=address, rank=int(sending), world_size=2, timeout=limit)
        return RankTransport(int(not sending))
    if kind == "file":
        from spectrumkv_hf.transfer.directory import DirectoryReceiver, DirectorySender

        return (DirectorySender if sending else DirectoryReceiver)(folder / "frames")
    from spectrumkv_hf.transfer.nixl import NixlListener, NixlSender

    if sending:
        return NixlSender(*pipe.recv(), TIMEOUT)
    with NixlListener() as listener:
        pipe.send(listener.address)
        return listener.accept(TIMEOUT)


def receive(kind: str, folder: Path, pipe: Connection, frames: int, payload: int) -> None:
    torch.set_num_threads(1)
    transport = connect(kind, folder, pipe, sending=False)
    assert not isinstance(transport, int) and hasattr(transport, "receive_head")
    for _ in range(frames):
        transport.receive_head(TIMEOUT)
        transport.receive_payload(payload, torch.device("cpu"), TIMEOUT)
        transport.reply(bytes(REPLY_BYTES), TIMEOUT)
    pipe.recv()
    transport.close()


def measure(kind: str, frames: int, payload: int, rounds: int, folder: Path) -> list[float]:
    """Bytes per second of each round; two frames are on their way at a time."""
    pipe, theirs = multiprocessing.Pipe()
    arguments = (kind, folder, theirs, frames * (rounds + 1), payload)
    receiver = multiprocessing.get_context("spawn").Process(target=receive, args=arguments)
    receiver.start()
    transport = connect(kind, folder, pipe, sending=True)
    assert hasattr(transport, "send")
    frame = torch.randint(256, (HEAD_BYTES + payload,), dtype=torch.uint8)
    rates = []
    for _ in range(rounds + 1):  # the first is for warming up
        began = time.monotonic()
        for index in range(frames):
            if index >= 2:
                transport.receive_reply(TIMEOUT)
            transport.send(frame, TIMEOUT)
        for _ in range(min(2, frames)):
            transport.receive_reply(TIMEOUT)
        rates.append(frames * len(frame) / (time.monotonic() - began))
    pipe.send("done")
    receiver.join()
    transport.close()
    if kind == "gloo":
        dist.destroy_process_group()
    return rates[1:]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--mib", type=int, default=4, help="payload of a frame")
    parser.add_argument("--frames", type=int, default=16, help="frames of a round")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in args.transports:
        folder = Path(tempfile.mkdtemp(prefix="spectrumkv-"))
        try:
            rates = [rate / 1e6 for rate in measure(kind, args.frames, args.mib << 20, args.rounds, folder)]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows.append([kind, *(f"{f(rates):.0f}" for f in (statistics.median, min, max))])
    print_table(["transport", "MB/s", "lowest", "highest"], rows)


if __name__ == "__main__":
    main()
