"""What only one transport can suffer: files of a directory, notifications and greetings of NIXL."""

import contextlib
import errno
import io
import os
import random
import socket
import stat
import struct
import sys
import threading
import time

import pytest
import torch
from pairs import missing

from spectrumkv_hf.transfer.directory import DirectoryReceiver, DirectorySender
from spectrumkv_hf.transfer.transport import TransportError
from spectrumkv_hf.wire import WireError

CPU = torch.device("cpu")
FRAME = torch.randint(256, (64 + 5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
REPLY = bytes(range(256)) * 2
QUICK = 0.2
"""Seconds of waits that are to fail."""


# -- directory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends(tmp_path):
    with DirectorySender(tmp_path) as sender, DirectoryReceiver(tmp_path) as receiver:
        yield sender, receiver


def test_directory_leaves_no_frame(ends, tmp_path):
    sender, receiver = ends
    for _ in range(3):
        sender.send(FRAME, 1)
        assert receiver.receive_head(1) == FRAME[:64].numpy().tobytes()
        assert torch.equal(receiver.receive_payload(5000, CPU, 1), FRAME[64:])
        receiver.reply(REPLY, 1)
        assert sender.receive_reply(1) == REPLY
    assert sorted(path.name for path in tmp_path.iterdir()) == ["receiver.lock", "sender.lock"]


def test_directory_serves_one_connection(ends, tmp_path):
    for end in (DirectorySender, DirectoryReceiver):
        with pytest.raises(ValueError, match="exists: a directory serves one sender and one receiver"):
            end(tmp_path)


@pytest.mark.parametrize("size", [0, 40])
def test_directory_frame_without_head(ends, tmp_path, size):
    (tmp_path / "frame-0").write_bytes(bytes(size))
    with pytest.raises(TransportError, match=f"truncated: the sender's frame has {size} bytes"):
        ends[1].receive_head(1)
    with pytest.raises(TransportError, match="lost the receiver"):
        ends[0].receive_reply(1)


def test_directory_bad_reply(ends, tmp_path):
    (tmp_path / "reply-0").write_bytes(b"yes")
    with pytest.raises(TransportError, match="the receiver's reply has 3 bytes instead of 512"):
        ends[0].receive_reply(1)


def test_directory_does_not_follow_links(ends, tmp_path):
    (tmp_path / "frame-0").symlink_to(sys.executable)
    with pytest.raises(TransportError, match="can't read frame-0: .*a link, no regular file"):
        ends[1].receive_head(1)


def test_directory_is_for_its_user(tmp_path):
    """Whatever the umask: folders that are made, frames, replies and locks."""
    path = tmp_path / "made" / "for it"
    old = os.umask(0)
    try:
        with DirectorySender(path) as sender, DirectoryReceiver(path) as receiver:
            sender.send(FRAME, 1)
            receiver.reply(REPLY, 1)
            modes = {p.name: stat.S_IMODE(p.lstat().st_mode) for p in (path.parent, path, *path.iterdir())}
    finally:
        os.umask(old)
    folders = {"made": 0o700, "for it": 0o700}
    files = dict.fromkeys(("frame-0", "reply-0", "sender.lock", "receiver.lock"), 0o600)
    assert modes == folders | files


def test_directory_of_a_group(tmp_path):
    """The owner lets a group in: its members can read what the others wrote."""
    tmp_path.chmod(0o770)
    with DirectorySender(tmp_path) as sender:
        sender.send(FRAME, 1)
        assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o660}


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
@pytest.mark.parametrize("end", [DirectorySender, DirectoryReceiver])
def test_directory_of_everyone(tmp_path, end, mode):
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match=rf"everyone can write into {tmp_path} \(mode {mode:04o}\)"):
        end(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_directory_of_someone_else(tmp_path):
    os.chown(tmp_path, 12345, 12345)
    for mode in (0o700, 0o770):
        tmp_path.chmod(mode)
        with pytest.raises(PermissionError, match="belongs to user 12345"):
            DirectorySender(tmp_path)
    os.chown(tmp_path, 12345, os.getegid())  # who shares it with this user
    DirectorySender(tmp_path).close()


def test_directory_planted_links(ends, tmp_path, tmp_path_factory):
    """Where a frame, a reply or their drafts would go there is a link to a file of the user."""
    precious = tmp_path_factory.mktemp("home") / "precious"
    precious.write_bytes(b"mine")
    for name in ("frame-0", ".frame-0", "reply-0", ".reply-0"):
        (tmp_path / name).symlink_to(precious)
    sender, receiver = ends
    sender.send(FRAME, 1)
    assert receiver.receive_head(1) == FRAME[:64].numpy().tobytes()
    receiver.receive_payload(5000, CPU, 1)
    receiver.reply(REPLY, 1)
    assert sender.receive_reply(1) == REPLY
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(sys.executable)])
@pytest.mark.parametrize("name", ["frame-0", "sender.lock"])
def test_directory_planted_pipes(tmp_path, plant, name):
    """Nobody waits for what is no file."""
    with DirectoryReceiver(tmp_path) as receiver:
        plant(tmp_path / name)
        began = time.monotonic()
        with pytest.raises(TransportError, match="no regular file"):
            receiver.receive_head(QUICK)
        assert time.monotonic() - began < 5
        with pytest.raises(TransportError, match="no regular file"):  # and the descriptor of the folder is not used
            receiver.reply(REPLY, QUICK)


def test_directory_exchanged_for_another(ends, tmp_path, tmp_path_factory):
    """The ends stay in the folder that they have checked."""
    sender, receiver = ends
    tmp_path.rename(moved := tmp_path_factory.mktemp("elsewhere") / "moved")
    tmp_path.mkdir()
    sender.send(FRAME, 1)
    assert (moved / "frame-0").exists() and not list(tmp_path.iterdir())
    assert receiver.receive_head(1) == FRAME[:64].numpy().tobytes()


def test_directory_that_vanishes(ends, tmp_path):
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    with pytest.raises(TransportError, match="can't write frame-0"):
        ends[0].send(FRAME, 1)
    with pytest.raises(TransportError, match="the sender is stalled or slow, nothing came in 0.2 s"):
        ends[1].receive_head(QUICK)


def test_directory_waits_for_a_peer_yet_to_come(tmp_path):
    with DirectoryReceiver(tmp_path) as receiver, pytest.raises(TransportError, match="the sender is stalled or slow"):
        receiver.receive_head(QUICK)


class Unreadable(io.BytesIO):
    """A file on a disk that fails."""

    def read(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_directory_that_can_not_be_read(ends, monkeypatch):
    """An error of the disk is one of the transport, and ends the connection."""
    sender, receiver = ends
    sender.send(FRAME, 1)
    receiver.reply(REPLY, 1)
    for end, look in ((sender, sender.receive_reply), (receiver, receiver.receive_head)):
        monkeypatch.setattr(end, "_arrived", lambda *_: Unreadable())
        with pytest.raises(TransportError, match="can't read what the .* wrote: .*Input/output error"):
            look(1)
        with pytest.raises(TransportError, match="can't read what the .* wrote"):
            end.send(FRAME, 1) if end is sender else end.reply(REPLY, 1)


@pytest.mark.parametrize("first", [0, 1])
def test_directory_of_which_both_are_gone(ends, tmp_path, first):
    """Frames and replies that nobody will read have what a prompt said; what else lies there stays."""
    sender, receiver = ends
    sender.send(FRAME, 1)
    receiver.reply(REPLY, 1)
    for name in (f".{'a' * 32}.part", "frame-9", "notes"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "frame-10").mkdir()
    ends[first].close()
    assert len(list(tmp_path.iterdir())) == 8  # the other one may still read them
    ends[1 - first].close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frame-10", "notes", "receiver.lock", "sender.lock"]


def test_directory_to_which_nobody_came(tmp_path):
    with DirectorySender(tmp_path) as sender:
        sender.send(FRAME, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["sender.lock"]


# -- NIXL -------------------------------------------------------------------------------------------------------------

needs_nixl = pytest.mark.skipif(missing("nixl"), reason="nixl is not installed")


@pytest.fixture(scope="module")
def nixl():
    from spectrumkv_hf.transfer import nixl

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "ERROR"}.items():
            patch.setenv(name, value)
        yield nixl


@pytest.fixture
def nixl_ends(nixl):
    senders = []
    with nixl.NixlListener() as listener:
        thread = threading.Thread(target=lambda: senders.append(nixl.NixlSender(*listener.address, 20)))
        thread.start()
        receiver = listener.accept(20, slots=4, slot_bytes=1000)
        thread.join()
    with receiver, senders[0]:
        yield senders[0], receiver


def send_and_reply(sender, receiver, frames):
    """Send frames from another thread; what was received of them."""
    replies, received = [], []

    def send():
        for frame in frames:
            sender.send(frame, 20)
        replies.extend(sender.receive_reply(20) for _ in frames)

    thread = threading.Thread(target=send)
    thread.start()
    for frame in frames:
        head = torch.frombuffer(bytearray(receiver.receive_head(20)), dtype=torch.uint8)
        received.append(torch.cat((head, receiver.receive_payload(len(frame) - 64, CPU, 20))))
        receiver.reply(REPLY, 20)
    thread.join()
    assert replies == [REPLY] * len(frames)
    return received


@needs_nixl
def test_nixl_notifications_in_any_order(nixl_ends, monkeypatch):
    """Frames of many parts, their notifications held back and shuffled across frames."""
    sender, receiver = nixl_ends
    get, held, shuffle, empty = receiver._agent.get_new_notifs, [], random.Random(0).shuffle, 0

    def shuffled():
        nonlocal empty
        held.extend(note for notes in get().values() for note in notes)
        empty += 1
        if len(held) < 3 and empty < 40:  # wait for more to shuffle, but not for ever
            return {}
        notes, empty = held[:], 0
        shuffle(notes)
        orders.append(notes != held)
        held.clear()
        return {"sender": notes} if notes else {}

    orders = []
    monkeypatch.setattr(receiver._agent, "get_new_notifs", shuffled)
    frames = [FRAME.roll(shift)[: 64 + size] for shift, size in enumerate((5000, 1, 999, 1000, 1001, 300, 4000))]
    received = send_and_reply(sender, receiver, frames)
    assert any(orders)
    for frame, got in zip(frames, received, strict=True):
        assert torch.equal(frame, got)


@needs_nixl
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: b"SPKVNONE"}, "announces no part"),
        ({1: 9}, "frame 9 in slot .*: impossible"),
        ({2: 4}, "slot 4: impossible"),
        ({3: 1001}, "announced 1001 bytes"),
        ({3: 0}, "announced 0 bytes"),
        ({4: 4001}, "don't fit together"),
    ],
)
def test_nixl_notifications_that_lie(nixl, nixl_ends, monkeypatch, change, message):
    """What a part says of itself is checked before anything is done with it, and both ends hear of the end."""
    sender, receiver = nixl_ends
    get = receiver._agent.get_new_notifs

    def lying(note):
        fields = list(nixl.PART.unpack(note))
        for index, value in change.items():
            fields[index] = value
        return nixl.PART.pack(*fields)

    monkeypatch.setattr(
        receiver._agent,
        "get_new_notifs",
        lambda: {name: [lying(note) for note in notes] for name, notes in get().items()},
    )
    sender.send(FRAME[:864], 20)  # of one part
    with pytest.raises(TransportError, match=message):
        receiver.receive_head(20)
        receiver.receive_payload(800, CPU, 20)
    with pytest.raises(TransportError, match="lost the receiver"):
        sender.receive_reply(20)
    with pytest.raises(TransportError, match=message):
        receiver.receive_head(20)


@needs_nixl
def test_nixl_slots_bound_what_is_on_the_way(nixl_ends):
    """A frame of more parts than slots waits for the receiver, and no longer than it may."""
    sender, receiver = nixl_ends
    began = time.monotonic()
    with pytest.raises(TransportError, match="the receiver is stalled or slow, nothing came in 0.2 s"):
        sender.send(FRAME, QUICK)
    assert time.monotonic() - began < 10 * QUICK
    receiver.receive_head(20)
    with pytest.raises(TransportError, match="lost the sender"):
        receiver.receive_payload(5000, CPU, 20)


@needs_nixl
def test_nixl_length_that_differs_leaves_the_connection(nixl_ends):
    sender, receiver = nixl_ends
    sender.send(FRAME[:2064], 20)
    receiver.receive_head(20)
    with pytest.raises(WireError, match="the payload has 2000 bytes, its header says 2001"):
        receiver.receive_payload(2001, CPU, 20)
    receiver.reply(REPLY, 20)
    assert sender.receive_reply(20) == REPLY
    assert torch.equal(send_and_reply(sender, receiver, [FRAME])[0], FRAME)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (b"", "did not say how to send: it closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64), "begins with b'HTTP/1.1'"),
        (struct.pack("<8sHIQQI", b"SPKVNIXL", 2, 1, 1, 0, 0), "version 2; expected"),
        (struct.pack("<8sHIQQI", b"SPKVNIXL", 1, 1 << 31, 1 << 40, 0, 9), "offers 2147483648 slots"),
        (struct.pack("<8sHIQQI", b"SPKVNIXL", 1, 1, 64, 0, 1 << 30), "1073741824 of metadata"),
        (struct.pack("<8sHIQQI", b"SPKVNIXL", 1, 1, 64, 0, 99) + b"short", "it closed the connection"),
        (
            struct.pack("<8sHIQQI", b"SPKVNIXL", 1, 1, 64, 0, 64) + bytes(range(1, 65)),
            "lost the receiver|needs the package nixl",
        ),
    ],
    ids=["nothing", "http", "version", "slots", "long", "short", "metadata"],
)
def test_nixl_greeting_of_something_else(nixl, hello, message):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # the sender may hang up first
                connection.sendall(hello)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(1)  # until the sender hangs up

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises((TransportError, ImportError), match=message):
            nixl.NixlSender(*server.getsockname(), 20)
        thread.join()


def test_nixl_greeting_that_trickles(nixl):
    """A byte now and then, each well within the timeout: the greeting as a whole has to be."""
    hello = struct.pack("<8sHIQQI", b"SPKVNIXL", 1, 1, 64, 0, 1000) + bytes(1000)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                for byte in hello:
                    connection.sendall(bytes([byte]))
                    time.sleep(QUICK / 4)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        with pytest.raises(TransportError, match="did not say how to send: timed out"):
            nixl.NixlSender(*server.getsockname(), 2 * QUICK)
        assert time.monotonic() - began < 10 * QUICK
        thread.join()


@needs_nixl
def test_nixl_frame_that_trickles(nixl_ends, monkeypatch):
    """A frame of many parts has its timeout as a whole, however often a slot is freed."""
    sender, receiver = nixl_ends
    frame, tell = FRAME.repeat(5), receiver._tell  # 26 parts
    monkeypatch.setattr(receiver, "_tell", lambda *message: time.sleep(QUICK / 2) or tell(*message))

    def take_slowly():
        with contextlib.suppress(TransportError):
            receiver.receive_head(20)
            receiver.receive_payload(len(frame) - 64, CPU, 20)

    thread = threading.Thread(target=take_slowly)
    thread.start()
    began = time.monotonic()
    with pytest.raises(TransportError, match="the receiver is stalled or slow, nothing came in 0.2 s"):
        sender.send(frame, QUICK)
    assert time.monotonic() - began < 10 * QUICK
    thread.join()


@needs_nixl
def test_nixl_replies_to_nothing(nixl_ends):
    """A receiver can't fill the sender's memory."""
    sender, receiver = nixl_ends
    for _ in range(5):
        receiver.reply(REPLY, 1)
    with pytest.raises(TransportError, match="the receiver replied 2 times to 0 frames"):
        for _ in range(100):
            sender.receive_reply(5)


def test_many_files_may_be_open(nixl):
    """Beyond the 1024 that `select` can name."""
    from spectrumkv_hf.transfer.nixl_end import readable

    here, there = socket.socketpair()
    high = 2000
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= high:
        pytest.skip("this process may not open so many files")
    os.dup2(here.fileno(), high)
    with here, there, socket.socket(fileno=high) as far:
        assert not readable(far, 0)
        there.send(b"!")
        assert readable(far, 1)


@needs_nixl
def test_nixl_with_too_many_files_open(nixl_ends, monkeypatch):
    def none_left():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("spectrumkv_hf.transfer.nixl_end.selectors.DefaultSelector", none_left)
    for look in (nixl_ends[0].receive_reply, nixl_ends[1].receive_head):
        with pytest.raises(TransportError, match="lost the .*Too many open files"):
            look(1)


def test_nixl_nobody_there(nixl):
    with nixl.NixlListener() as listener:
        address = listener.address
        with pytest.raises(TransportError, match="no sender came"):
            listener.accept(QUICK)
        with pytest.raises(ValueError, match="slots and slot_bytes are 1 or more"):
            listener.accept(QUICK, slots=0)
    with pytest.raises(TransportError, match=f"can't reach the receiver at 127.0.0.1:{address[1]}"):
        nixl.NixlSender(*address, QUICK)
