"""Transfers and stores under injected faults: nothing wrong is returned, nothing hangs, nothing is left behind.

Every kind of fault befalls every operation of a small transfer, or of a use of a store; then come mixtures by seed. A
case has to end in time, in the right cache or in the error that is documented.
"""

import contextlib
import functools
import gc
import itertools
import os
import random
import threading
import time
import uuid
import warnings
from concurrent import futures
from pathlib import Path

import chaos
import chaos_files
import families
import pytest
import torch
import torch.distributed as dist
from chaos import (
    FAULTS,
    PATIENCE,
    ChaosReceiver,
    ChaosSender,
    Died,
    Fault,
    Plan,
    Tally,
    each_fault,
    judge,
    judge_next,
    mixture,
    twice,
)
from chaos_files import faulty_files
from families import prompt
from pairs import missing, peer

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.transfer import TransferError
from spectrumkv_hf.transfer.directory import DirectoryReceiver, DirectorySender
from spectrumkv_hf.transfer.prefix_store import PrefixStore
from spectrumkv_hf.transfer.transport import RankTransport

TOKENS = 100
FRAMES = 4
"""Header, two layers, end."""
TIMEOUT = 0.1
"""Of transfers that may fail."""
LIMIT = 10.0
"""Seconds after which one of these hangs: it has a dozen of waits."""
SLACK = 2.0
"""Seconds by which one wait may exceed its timeout, on a busy machine."""
OPERATIONS = dict.fromkeys(FAULTS, FRAMES)
KEY = b"k" * 32
WITH_KEY = dict.fromkeys(FAULTS, FRAMES + 1)
"""A greeting goes ahead."""


@functools.cache
def model():
    return families.model("llama")


@functools.cache
def cache():
    """One to send; transfers leave it as it is."""
    made = SpectrumCache(model().config, "sink_protect", 0.3)
    with torch.no_grad():
        model()(prompt(TOKENS), **cache_argument(made))
    return made


@functools.cache
def expected():
    return cache().serialize().numpy().tobytes()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def both(sender, receiver, timeout, in_flight=2, limit=LIMIT, key=None):
    """What the two sides come to, in threads of their own, and whether one of them hangs."""
    sides = {}

    def run(name, act, transport):
        sides[name] = act(transport)
        if isinstance(sides[name].error, Died):
            with contextlib.suppress(Died):
                transport.close()  # as the system does

    send = functools.partial(chaos.send_side, cache(), timeout=timeout, in_flight=in_flight, key=key)
    receive = functools.partial(chaos.receive_side, model().config, timeout=timeout, key=key)
    threads = [
        threading.Thread(target=run, args=arguments, daemon=True)
        for arguments in (("sent", send, sender), ("received", receive, receiver))
    ]
    until = time.monotonic() + limit
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    return None if any(thread.is_alive() for thread in threads) else (sides["sent"], sides["received"])


def suffer(tally, case, ends, plan, timeout=TIMEOUT, in_flight=2, wrapped=True, key=None):
    """One transfer by a plan, and a clean one after it over the same connection, as far as it serves."""
    sender, receiver = ends
    suffering = (ChaosSender(sender, plan), ChaosReceiver(receiver, plan)) if wrapped else ends
    with contextlib.nullcontext() if wrapped else faulty_files(plan):
        sides = both(*suffering, timeout, in_flight, key=key)
    if sides is None or plan.overtime > SLACK:
        tally.hangs.append(f"{case}, {plan.overtime:.1f} s too long")
        return
    judge(tally, case, plan, *sides, expected())
    if sides[0].usable and sides[1].usable:
        again = both(*ends, PATIENCE, limit=4 * PATIENCE, key=key)
        if again is None:
            tally.hangs.append(f"{case}, the transfer after it")
        else:
            judge_next(tally, case, plan, *again, expected())


@contextlib.contextmanager
def nothing_stays(tally, case, folder=None):
    """No thread, no open file, none that only the garbage collector closes, no file of a frame."""
    before, threads = open_files(), threading.active_count()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()  # of what hangs in tracebacks
    if unclosed := [str(each.message) for each in caught if each.category is ResourceWarning]:
        tally.left.append(f"{case}: {unclosed}")
    if (now := open_files()) != before:
        tally.left.append(f"{case}: {now - before} open files")
    if (now := threading.active_count()) != threads:
        tally.left.append(f"{case}: {now - threads} threads")
    if folder is not None and (files := chaos_files.left_in(folder)):
        tally.left.append(f"{case}: {files}")


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """What is there by now is left out of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -- transports -------------------------------------------------------------------------------------------------------


def suffer_all(tally, connect, cases, timeout=TIMEOUT, right=True, key=None):
    """Transfers with these faults, each over a connection of its own; the number of frames in flight is with them."""
    for seed, (in_flight, faults) in enumerate(cases):
        case = f"{seed}: {faults}, {in_flight} in flight"
        with nothing_stays(tally, case), contextlib.ExitStack() as closing:
            ends = connect()
            for end in ends:
                closing.callback(end.close)
            suffer(tally, case, ends, Plan(faults, seed), timeout, in_flight, key=key)
    tally.check(FAULTS, right)


def test_queue():
    suffer_all(Tally("queue"), chaos.queue_ends, [(2, [fault]) for fault in each_fault(OPERATIONS, FAULTS)])


def test_queue_with_a_key():
    cases = [(2, [fault]) for fault in each_fault(WITH_KEY, FAULTS)]
    suffer_all(Tally("queue, with a key"), chaos.queue_ends, cases, key=KEY)


def mixtures(count, faults):
    """In flight and faults, by seed."""
    rngs = map(random.Random, range(count))
    return [(rng.randint(1, 4), mixture(rng, faults)) for rng in rngs]


@pytest.mark.parametrize(
    "faults",
    [
        # The answer to an earlier frame was taken for that of the last one, which was refused, or lost.
        [Fault("payload", 3, "flip"), Fault("hear", 0, "duplicate")],
        [Fault("send", 2, "duplicate"), Fault("answer", 2, "duplicate")],
        [Fault("send", 3, "reorder"), Fault("hear", 1, "duplicate")],
        # A stop of another length.
        [Fault("send", 1, "flip"), Fault("head", 3, "cut")],
        [Fault("send", 1, "flip"), Fault("payload", 3, "cut")],
    ],
)
def test_found_by_mixtures(faults):
    tally = Tally("found by mixtures")
    suffer(tally, faults, chaos.queue_ends(), Plan(faults))
    tally.check({}, right=False)


MIXED = each_fault(dict.fromkeys(FAULTS, FRAMES + 2), FAULTS)
"""Beyond the frames of one transfer there are a stop, and replies to it."""


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_queue_mixtures(count):
    suffer_all(Tally("queue, mixtures"), chaos.queue_ends, mixtures(count, MIXED), TIMEOUT / 2)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_queue_mixtures_with_a_key(count):
    faults = each_fault(dict.fromkeys(FAULTS, FRAMES + 3), FAULTS)
    suffer_all(Tally("queue, mixtures with a key"), chaos.queue_ends, mixtures(count, faults), TIMEOUT / 2, key=KEY)


def directory_ends(place):
    return DirectorySender(place), DirectoryReceiver(place)


@pytest.mark.parametrize("key", [None, KEY], ids=["", "with a key"])
def test_directory(tmp_path, key):
    number = itertools.count()
    faults = one_of_each(each_fault(WITH_KEY, FAULTS)) if key else each_fault(OPERATIONS, FAULTS)
    cases = [(2, [fault]) for fault in faults]
    tally = Tally("directory, with a key" if key else "directory")
    suffer_all(tally, lambda: directory_ends(tmp_path / str(next(number))), cases, right=not key, key=key)
    assert not [name for place in tmp_path.iterdir() for name in chaos_files.left_in(place)]


def suffer_files(tally, place, case, plan):
    """A connection that is made, used and closed in a directory of its own."""
    with nothing_stays(tally, case, place), contextlib.ExitStack() as closing:
        try:
            with faulty_files(plan):
                ends = [closing.enter_context(end(place)) for end in (DirectorySender, DirectoryReceiver)]
        except (OSError, Died):
            tally.cases, tally.refused, tally.faults = tally.cases + 1, tally.refused + 1, tally.faults + plan.happened
            return
        suffer(tally, case, ends, plan, in_flight=1, wrapped=False)


def test_directory_files(tmp_path):
    tally, clean = Tally("files of a directory"), Plan()
    suffer_files(tally, tmp_path / "clean", "no fault", clean)
    assert (tally.cases, tally.right) == (1, 1)
    for number, fault in enumerate(each_fault(clean.counts, chaos_files.FAULTS)):
        suffer_files(tally, tmp_path / str(number), fault, Plan([fault]))
    tally.check(chaos_files.FAULTS)


# -- NIXL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nixl_ends(monkeypatch):
    if missing("nixl"):
        pytest.skip("nixl is not installed")
    from spectrumkv_hf.transfer.nixl import NixlListener, NixlSender

    for name, value in {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "ERROR"}.items():
        monkeypatch.setenv(name, value)

    def connect():
        with NixlListener() as listener, futures.ThreadPoolExecutor(1) as pool:
            sender = pool.submit(NixlSender, *listener.address, PATIENCE)
            receiver = listener.accept(PATIENCE, slots=3, slot_bytes=10_000)
            return sender.result(), receiver

    return connect


def one_of_each(faults, seed=0):
    """Every kind of fault of every operation, each at one place."""
    rng, places = random.Random(seed), {}
    for fault in faults:
        places.setdefault((fault.operation, fault.kind), []).append(fault)
    return [rng.choice(each) for each in places.values()]


@pytest.mark.parametrize("choose", [one_of_each, pytest.param(list, marks=pytest.mark.slow)])
def test_nixl(nixl_ends, choose):
    for end in nixl_ends():
        end.close()  # what stays open once it was open is open now
    cases = [(2, [fault]) for fault in choose(each_fault(OPERATIONS, FAULTS))]
    suffer_all(Tally("NIXL"), nixl_ends, cases, 2 * TIMEOUT, right=False)


# -- gloo, and processes that die -------------------------------------------------------------------------------------


def over_gloo(faults, timeout):
    """In one of two processes: what its sides of transfers with these faults came to, each in a group of its own."""
    rank, outcomes, before = dist.get_rank(), [], 0
    for seed, fault in enumerate(faults):
        plan, group = Plan([fault], seed), dist.new_group([0, 1])
        sides = [one_side(rank, RankTransport(1 - rank, group), plan, timeout)]
        usable = [False, False]
        dist.all_gather_object(usable, sides[0].usable)
        if all(usable):
            patience = TIMEOUT if twice(plan) else PATIENCE  # nobody answers what came twice
            sides.append(one_side(rank, RankTransport(1 - rank, group), Plan(), patience))
        dist.destroy_process_group(group)
        outcomes.append((sides, plan))
        before = before or open_files()  # what the first one opens stays open
    return outcomes, open_files() - before


def one_side(rank, transport, plan, timeout):
    """The sender's or the receiver's."""
    if rank == 0:
        return chaos.send_side(cache(), ChaosSender(transport, plan), timeout).bare()
    return chaos.receive_side(model().config, ChaosReceiver(transport, plan), timeout).bare()


@pytest.mark.parametrize("choose", [one_of_each, pytest.param(list, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gloo"], indirect=True)
def test_gloo(pair, kind, choose):
    tally = Tally("gloo")
    faults = choose(each_fault(OPERATIONS, FAULTS))
    run = functools.partial(over_gloo, faults, TIMEOUT)
    (sent, more), (received, more_too), _ = pair(run, run)
    for fault, (ours, plan), (theirs, other) in zip(faults, sent, received, strict=True):
        plan.happened += other.happened
        if (most := max(plan.overtime, other.overtime)) > SLACK:
            tally.hangs.append(f"{fault}, {most:.1f} s too long")
        judge(tally, fault, plan, ours[0], theirs[0], expected())
        if len(ours) == 2:
            judge_next(tally, fault, plan, ours[1], theirs[1], expected())
    if more or more_too:
        tally.left.append(f"{more} and {more_too} open files")
    tally.check(FAULTS, right=False)


def end_of(rank, plan, timeout):
    """In one of two processes: its side of a transfer, and how long it took."""
    transport = RankTransport(peer()) if isinstance(peer(), int) else peer()
    began = time.monotonic()
    side = one_side(rank, transport, plan, timeout)
    return side, time.monotonic() - began


DEATHS = [Fault(operation, at, "kill") for operation in ("send", "head", "answer") for at in range(FRAMES)]


@pytest.mark.parametrize("choose", [one_of_each, pytest.param(list, marks=pytest.mark.slow)])
def test_processes_that_die(pair, kind, choose, tmp_path):
    """Killed by the system, before a sender sends a frame, or a receiver takes or answers it."""
    tally = Tally(f"processes that die, {kind}")
    for fault in choose(DEATHS) if kind == "nixl" else DEATHS:
        *sides, _ = pair(*(functools.partial(end_of, rank, Plan([fault]), 10 * TIMEOUT) for rank in (0, 1)))
        assert sides.count(None) == 1, fault
        tally.cases += 1
        tally.faults[fault.operation, fault.kind] += 1
        survivor, seconds = sides[0] or sides[1]
        if isinstance(survivor.error, TransferError):
            tally.refused += 1
        else:
            tally.wrong.append(f"{fault}: {survivor}")
        if seconds > 10 * TIMEOUT + SLACK:
            tally.hangs.append(f"{fault}: {seconds:.1f} s")
    tally.left += [str(path) for path in tmp_path.glob("place*/frames/*") if path.suffix != ".lock"]
    tally.check({operation: ["kill"] for operation in ("send", "head", "answer")}, right=False)


# -- stores -----------------------------------------------------------------------------------------------------------

IDS, OTHER, OLD = (prompt(TOKENS, seed=seed) for seed in (0, 1, 2))
"""What is stored under faults, what the store holds before, and what has to go then."""
MAX_BYTES = 120_000
"""Room for two of them."""


def store(place):
    return PrefixStore(place, model(), "sink_protect", 0.3, key=KEY, max_bytes=MAX_BYTES)


@functools.cache
def filled(ids):
    """The bytes of a cache."""
    made = SpectrumCache(model().config, "sink_protect", 0.3)
    with torch.no_grad():
        model()(ids, **cache_argument(made))
    return made.serialize()


@functools.cache
def cropped(ids, tokens):
    """Those of one of which so many tokens are left."""
    made = SpectrumCache.deserialize(filled(ids), model().config)
    made.crop(tokens - TOKENS)
    return made.serialize().numpy().tobytes()


def found(tally, case, place, ids):
    """Whether `get` finds a prompt; what it gives has to be right."""
    got = store(place).get(ids)
    if got is not None and got.serialize().numpy().tobytes() != cropped(ids, got.get_seq_length()):
        tally.wrong.append(f"{case}: a wrong cache")
    return got is not None


def unlisted(place):
    """Entries of a folder to which nothing leads."""
    listed = "".join(path.read_text(errors="replace") for path in place.glob("*.at"))
    return [path.name for path in place.glob("*.kv") if path.stem not in listed]


def suffer_store(tally, case, place, plan, faulty):
    """A store is given a prompt and asked for it and another, by a plan; a miss is right, and then it has to work."""
    for ids in (OLD, OTHER):
        store(place).put(ids, SpectrumCache.deserialize(filled(ids), model().config))
    began, died, told, hits = time.monotonic(), False, False, []
    with nothing_stays(tally, case):
        with faulty(plan):
            try:
                try:
                    store(place).put(IDS, cache())
                except OSError:
                    told = True
                hits += [found(tally, case, place, ids) for ids in (IDS, OTHER)]
            except Died:
                died = True
            except Exception as problem:
                tally.wrong.append(f"{case}: {problem!r}")
        hits += [found(tally, case, place, ids) for ids in (IDS, OTHER)]
    if time.monotonic() - began > LIMIT:
        tally.hangs.append(case)
    if isinstance(place, Path) and not died:
        left = [path.name for path in place.iterdir() if path.suffix not in (".kv", ".at")]
        # One fault alone leaves nothing. Of several one may have lost what leads to an entry and said nothing, or have
        # kept one file from being removed.
        mixed = plan.happened.total() > 1
        silent = any(kind not in ("full", "broken") for _, kind in plan.happened)
        left += unlisted(place) if told and not (mixed and silent) else []
        if len(left) > (plan.happened["unlink", "broken"] if mixed else 0):
            tally.left.append(f"{case}: {left}")
    tally.cases, tally.faults = tally.cases + 1, tally.faults + plan.happened
    tally.right, tally.refused = tally.right + all(hits), tally.refused + (not all(hits))
    store(place).put(IDS, cache())
    if not found(tally, case, place, IDS):
        tally.wrong.append(f"{case}: not found after it was stored again")


STORES = {"folder": (faulty_files, chaos_files.OF_STORES), "url": (chaos_files.faulty_memory, chaos_files.OF_URLS)}


def places(kind, folder):
    """Of new stores."""
    return (folder / str(n) if kind == "folder" else f"memory://{uuid.uuid4().hex}" for n in itertools.count())


@functools.cache
def operations(kind, folder):
    """Of a use of a store without faults, by their kind."""
    tally, clean = Tally("no fault"), Plan()
    suffer_store(tally, "no fault", next(places(kind, folder / "clean")), clean, STORES[kind][0])
    assert tally.right == 1 and not tally.wrong
    return clean.counts


@pytest.mark.parametrize("kind", STORES)
def test_store(kind, tmp_path):
    faulty, kinds = STORES[kind]
    tally, new = Tally(f"store, {kind}"), places(kind, tmp_path)
    for fault in each_fault(operations(kind, tmp_path), kinds):
        suffer_store(tally, str(fault), next(new), Plan([fault]), faulty)
    tally.check(kinds)


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", STORES)
def test_store_mixtures(kind, count, tmp_path):
    faulty, kinds = STORES[kind]
    tally, new = Tally(f"store, {kind}, mixtures"), places(kind, tmp_path)
    for seed, (_, faults) in enumerate(mixtures(count, each_fault(operations(kind, tmp_path), kinds))):
        suffer_store(tally, f"{seed}: {faults}", next(new), Plan(faults, seed), faulty)
    tally.check({})
