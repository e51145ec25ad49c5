"""Two processes, a sender and a receiver, with a connection of each transport between them."""

import functools
import importlib.util
import itertools
import multiprocessing
import os
import time
import traceback
from datetime import timedelta

import families
import pytest
import torch
import torch.distributed as dist

PATIENCE = 60.0
"""Seconds after which a test gives up; nothing here takes long, but processes start slowly on a busy machine."""
RANKS = ("gloo", "nccl")
"""Transports of `torch.distributed`."""
NAMES = dict.fromkeys(RANKS, ("rank 0", "rank 1"))
"""What the ends call each other in messages, sender and receiver."""
TRANSPORTS = ["gloo", "directory", "nixl"]


def names(kind):
    return NAMES.get(kind, ("the sender", "the receiver"))


def missing(kind):
    """Whether a transport is not installed."""
    modules = ("nixl", "nixl_cu12", "nixl_cu13")
    return kind == "nixl" and not any(map(importlib.util.find_spec, modules))


_peer = None


def peer():
    """In one of the two processes: the other, as rank or transport."""
    return _peer


def connect(kind, rank, place):
    """The connection, once both processes have it."""
    if kind in RANKS:
        ends = {"init_method": f"file://{place}", "rank": rank, "world_size": 2}
        if kind == "nccl":
            on_one_gpu(rank)
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # else PyTorch ends the process where a transfer fails
            torch.cuda.set_device(rank % torch.cuda.device_count())
            # With a device communicators are made here; else the first message makes them, and waits without a limit.
            ends["device_id"] = torch.device("cuda", torch.cuda.current_device())
        backend = "gloo" if kind == "gloo" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE), **ends)
        dist.barrier()
        return 1 - rank
    place.mkdir(exist_ok=True)
    if kind == "directory":
        from spectrumkv_hf.transfer.directory import DirectoryReceiver, DirectorySender

        transport = (DirectorySender, DirectoryReceiver)[rank](place / "frames")
    else:
        from spectrumkv_hf.transfer.nixl import NixlListener, NixlSender

        if rank == 1:
            with NixlListener() as listener:
                tell(place / "port", str(listener.address[1]))
                transport = listener.accept(PATIENCE, slots=3, slot_bytes=10_000)  # a frame takes many
        else:
            transport = NixlSender("127.0.0.1", int(told(place / "port")), PATIENCE)
    tell(place / f"{rank}")
    told(place / f"{1 - rank}")
    return transport


def on_one_gpu(rank):
    """Let NCCL take two processes with one GPU for two machines, which talk over sockets; no matter with two GPUs."""
    if torch.cuda.device_count() == 1:
        os.environ.update(NCCL_HOSTID=str(rank), NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")


def tell(path, text=""):
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def told(path):
    until = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.005)
    return path.read_text()


def serve(connection):
    """A process that runs the tasks it is sent: function, transport, rank, rendezvous file, arguments."""
    global _peer
    torch.set_num_threads(1)
    families.model("llama")  # so that short timeouts don't meet it half made
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(UCX_TLS="tcp,self", UCX_NET_DEVICES="lo", NIXL_LOG_LEVEL="ERROR")
    while True:
        function, kind, rank, place, arguments = connection.recv()
        began = time.monotonic()
        try:
            _peer = connect(kind, rank, place)
            began = time.monotonic()
            outcome = function(*arguments)
        except BaseException:  # whatever it is, the test shall see it
            outcome = AssertionError(traceback.format_exc())
        seconds = time.monotonic() - began
        if dist.is_initialized():
            dist.destroy_process_group()
        elif _peer is not None:
            _peer.close()
        _peer = None
        connection.send((outcome, seconds))


def start_method():
    """How processes start soonest: they fork from one that has imported all this."""
    if torch.cuda.is_available():  # a process that has asked for devices can't be forked
        return "spawn"
    modules = ["families", "pairs", "spectrumkv_hf.transfer", "transformers.masking_utils"]
    multiprocessing.set_forkserver_preload(modules)
    return "forkserver"


class Worker:
    def __init__(self):
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context(start_method())
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()

    def result(self):
        """What the task returned or raised, and its seconds; None of a process that died."""
        if not self.connection.poll(2 * PATIENCE):
            return AssertionError("a process hangs"), 0.0
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return None, 0.0


@pytest.fixture(scope="module")
def start_pair():
    workers = []

    def start():
        while len(workers) < 2 or not all(worker.process.is_alive() for worker in workers):
            workers[:] = [worker for worker in workers if worker.process.is_alive()]
            workers.append(Worker())
        return workers

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.join()


@pytest.fixture(params=TRANSPORTS)
def kind(request):
    """Name of the transport."""
    if missing(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def pair(start_pair, kind, tmp_path):
    """Runs a sender's and a receiver's function at once, gives what they return and the longer of their times."""
    counter = itertools.count()

    def run(send, receive):
        workers = start_pair()
        place = tmp_path / f"place{next(counter)}"
        for rank, (worker, task) in enumerate(zip(workers, (send, receive), strict=True)):
            function, arguments = (task.func, task.args) if isinstance(task, functools.partial) else (task, ())
            worker.connection.send((function, kind, rank, place, arguments))
        outcomes = [worker.result() for worker in workers]
        for outcome, _ in outcomes:
            if isinstance(outcome, AssertionError):
                raise outcome
        (sent, took), (received, took_too) = outcomes
        return sent, received, max(took, took_too)

    return run
