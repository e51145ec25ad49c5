"""Transfers between two processes over every transport: whole and streamed, and every way in which they fail."""

import contextlib
import functools
import os
import re
import signal
import time

import families
import pytest
import torch
import torch.distributed as dist
from families import prompt
from pairs import PATIENCE, names, peer
from wire_forge import forged

from spectrumkv_hf import SpectrumCache, wire
from spectrumkv_hf.transfer import CacheReceiver, CacheSender, TransferError, recv_cache, send_cache
from spectrumkv_hf.transfer.exchange import sending_to
from spectrumkv_hf.transfer.link import FrameSender

FRAMES = wire.frames
TOKENS = 300
TIMEOUT = 1.0
"""Of transfers that are to fail."""
SLOW_START = 5.0
"""The same over NCCL, where processes load kernels first."""


# -- what they run ----------------------------------------------------------------------------------------------------


where = "cpu"
"""Where this process's models are."""


def model(family):
    """With a window long enough for tokens to be tiered before they leave it."""
    return families.model(family, **({"sliding_window": 192} if family == "gemma3" else {})).to(where)


def new_cache(family, policy, budget):
    return SpectrumCache(model(family).config, policy=policy, budget=budget)


@torch.no_grad()
def prefill(family, cache, given=None):
    m = given or model(family)
    return m(prompt(TOKENS).to(m.device), past_key_values=cache).logits[:, -1:]


@torch.no_grad()
def decode(family, cache, steps=6):
    """Logits of further steps, `[1, steps, vocabulary]`."""
    m = model(family)
    ids = prompt(steps, seed=3).to(m.device)
    return torch.cat([m(ids[:, i, None], past_key_values=cache).logits for i in range(steps)], dim=1)


def expected(family, policy, budget):
    cache = new_cache(family, policy, budget)
    prefill(family, cache)
    return decode(family, cache)


def send_whole(family, policy, budget, timeout=PATIENCE):
    cache = new_cache(family, policy, budget)
    prefill(family, cache)
    report = send_cache(cache, peer(), timeout=timeout)
    assert report.frames == len(cache.layers) + 2
    return cache.serialize().clone(), report.bytes, decode(family, cache)


def send_streamed(family, policy, budget):
    cache = new_cache(family, policy, budget)
    with CacheSender(cache, peer(), timeout=PATIENCE) as sender:
        prefill(family, cache)
    assert not any(getattr(layer, "on_final", None) for layer in cache.layers)
    return cache.serialize().clone(), sender.report.bytes, decode(family, cache)


def receive(family, timeout=PATIENCE):
    receiver = CacheReceiver(peer(), model(family).config, timeout=timeout)
    cache = receiver.receive()
    return cache.serialize().clone(), receiver.report.bytes, decode(family, cache)


FAMILIES = [
    ("llama", "sink_protect", 0.3),
    ("llama", "fp16", 1.0),
    ("gemma3", "greedy", 0.5),
    ("qwen3_next", "drop_scored", 0.4),
]


@pytest.mark.parametrize(("family", "policy", "budget"), FAMILIES)
def test_round_trip(pair, family, policy, budget):
    """Logits and bytes of the received cache equal the sender's, which equal those without a transfer."""
    for send in (send_whole, send_streamed):
        (bytes_sent, count, logits), received, _ = pair(
            functools.partial(send, family, policy, budget), functools.partial(receive, family)
        )
        assert torch.equal(bytes_sent, received[0])
        assert count == received[1] == bytes_sent.numel()
        assert torch.equal(logits, received[2])
        assert torch.equal(logits, expected(family, policy, budget))


@contextlib.contextmanager
def on_gpu():
    """Models on the GPU."""
    global where
    where = "cuda"
    try:
        yield
    finally:
        where = "cpu"


def send_from_gpu(streamed, key=None):
    cache = new_cache("llama", "greedy", 0.5)
    with on_gpu():
        if streamed:
            with CacheSender(cache, peer(), timeout=PATIENCE, key=key):
                prefill("llama", cache)
        else:
            prefill("llama", cache)
            send_cache(cache, peer(), timeout=PATIENCE, key=key)
        return cache.serialize().cpu(), decode("llama", cache).cpu()


def receive_on_gpu(key=None):
    with on_gpu():
        cache = recv_cache(peer(), model("llama").config, timeout=PATIENCE, device="cuda", key=key)
        assert cache.layers[0].device.type == "cuda"
        return cache.serialize().cpu(), decode("llama", cache).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("streamed", [False, True])
def test_round_trip_between_gpus(pair, streamed, key=None):
    """By way of the host, as gloo goes."""
    (bytes_sent, logits), received, _ = pair(
        functools.partial(send_from_gpu, streamed, key), functools.partial(receive_on_gpu, key)
    )
    assert torch.equal(bytes_sent, received[0])
    assert torch.equal(logits, received[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nccl"], indirect=True)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("key", [None, b"k" * 32], ids=["no key", "key"])
def test_round_trip_over_nccl(pair, kind, streamed, key):
    """From device to device; two processes can share one."""
    test_round_trip_between_gpus(pair, streamed, key)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nccl"], indirect=True)
@pytest.mark.parametrize(
    ("key", "other", "refusal", "answer"),
    [
        (b"k" * 32, b"o" * 32, "with a wrong MAC: it has another key", "it has a MAC of another key"),
        (b"k" * 32, None, "without a MAC, and this side has a key", "has no key to check"),
        (None, b"k" * 32, "with a MAC, and this side has no key", "it has no MAC"),
    ],
    ids=["two keys", "sender's", "receiver's"],
)
def test_keys_that_differ_over_nccl(pair, kind, key, other, refusal, answer):
    """The greeting is refused, and both sides say why; see `test_keys.py` for the other transports."""
    texts = pair(functools.partial(send_refused, key), functools.partial(receive_refused, other))
    assert re.search(refusal, texts[0]) and re.search(answer, texts[1]), texts


def send_refused(key):
    with on_gpu(), pytest.raises(TransferError) as caught:
        cache = new_cache("llama", "greedy", 0.5)
        prefill("llama", cache)
        send_cache(cache, peer(), timeout=PATIENCE, key=key)
    return str(caught.value)


def receive_refused(key):
    with on_gpu(), pytest.raises(TransferError) as caught:
        recv_cache(peer(), model("llama").config, timeout=PATIENCE, device="cuda", key=key)
    return str(caught.value)


def send_chunks():
    cache = new_cache("llama", "greedy", 0.3)
    with CacheSender(cache, peer(), timeout=PATIENCE, tokens=TOKENS), torch.no_grad():
        for chunk in prompt(TOKENS).split(110, dim=1):
            model("llama")(chunk, past_key_values=cache)
    return decode("llama", cache)


def test_prefill_in_chunks(pair):
    logits, received, _ = pair(send_chunks, functools.partial(receive, "llama"))
    assert torch.equal(logits, received[2])


def send_and_watch(path):
    """Prefill enters layer 1 once the receiver has layer 0; whether that came to pass."""
    cache = new_cache("llama", "greedy", 0.5)

    def wait_for_layer_0(*_):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not path.exists():
            time.sleep(0.01)

    m = model("llama")
    m.model.layers[1].register_forward_pre_hook(wait_for_layer_0)
    with CacheSender(cache, peer(), timeout=PATIENCE):
        prefill("llama", cache, m)
    return path.exists()


def receive_and_tell(path):
    add = wire.Assembler.add

    def telling(self, header, payload):
        cache = add(self, header, payload)
        if header.layer == 0:
            path.touch()
        return cache

    wire.Assembler.add = telling
    try:
        return receive("llama")
    finally:
        wire.Assembler.add = add


def test_layers_are_received_during_prefill(pair, tmp_path):
    path = tmp_path / "layer 0"
    told, _, took = pair(functools.partial(send_and_watch, path), functools.partial(receive_and_tell, path))
    assert told
    assert took < PATIENCE


def send_counting(in_flight):
    """The most frames written and not acknowledged."""
    cache = new_cache_filled()
    sender = FrameSender(sending_to(peer(), None), PATIENCE, in_flight)
    most = []

    def counted(*args, **kwargs):
        for index, frame in enumerate(FRAMES(*args, **kwargs)):
            most.append(index + 1 - sender.report.frames)
            yield frame

    wire.frames = counted
    try:
        sender.send(cache)
    finally:
        wire.frames = FRAMES
    return max(most)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_frames_in_flight_are_bounded(pair, in_flight):
    most, _, _ = pair(functools.partial(send_counting, in_flight), functools.partial(receive, "llama"))
    assert most == in_flight + 1  # one of them is being written


# -- damage -----------------------------------------------------------------------------------------------------------


def twice(frames):
    return [*frames[:2], frames[1], *frames[3:]]


def swapped(frames):
    return [frames[0], frames[2], frames[1], frames[3]]


def damaged(frames):
    frames[2][-100] ^= 1
    return frames


def damaged_end(frames):
    frames[3][-100] ^= 1
    return frames


def truncated(frames):
    return [*frames[:2], frames[2][:-128], frames[3]]


def extended(frames):
    return [*frames[:2], torch.cat((frames[2], frames[2][:64])), frames[3]]


def of_another_stream(frames):
    other = list(FRAMES(new_cache_filled(), stream=1))
    return [*frames[:2], other[2], frames[3]]


def damaged_header(frames):
    frames[2][30] ^= 1
    return frames


def huge(frames):
    header = wire.FrameHeader.parse(frames[2])
    header = wire.FrameHeader(header.kind, header.index, header.layer, 1 << 40, header.digest, header.stream)
    frames[2][: header.SIZE] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
    return frames


def new_cache_filled():
    cache = new_cache("llama", "greedy", 0.5)
    prefill("llama", cache)
    return cache


def send_altered(alter, usable):
    """What sending altered frames raises, and whether the cache works after it, and the group."""
    cache = new_cache_filled()
    with altered_frames(alter), pytest.raises(TransferError) as caught:
        send_cache(cache, peer(), timeout=TIMEOUT)
    if usable:
        send_cache(cache, peer(), timeout=PATIENCE)
    else:
        with pytest.raises(TransferError, match="the header frame: (lost|.* lost the stream)"):
            send_cache(cache, peer(), timeout=TIMEOUT)
    return str(caught.value), caught.value.layer, caught.value.group_usable, decode("llama", cache)


@contextlib.contextmanager
def altered_frames(alter):
    original = wire.frames
    wire.frames = lambda *args, **kwargs: iter(alter(list(original(*args, **kwargs))))
    try:
        yield
    finally:
        wire.frames = original


def receive_altered(usable):
    with pytest.raises(TransferError) as caught:
        recv_cache(peer(), model("llama").config, timeout=TIMEOUT)
    logits = None
    if usable:
        logits = decode("llama", recv_cache(peer(), model("llama").config, timeout=PATIENCE))
    return str(caught.value), caught.value.layer, caught.value.group_usable, logits


@pytest.mark.parametrize(
    ("alter", "layer", "message"),
    [
        (twice, 0, "layer 0.*expected layer 1"),
        (swapped, 1, "layer 1.*expected layer 0"),
        (damaged, 1, "layer 1.*digest"),
        (damaged_end, -1, "digest"),
        (of_another_stream, 1, "layer 1.*stream"),
    ],
)
def test_refused_frames(pair, alter, layer, message):
    """Both sides say which layer, the receiver has no cache, and the same group serves the next transfer."""
    sent, received, took = pair(functools.partial(send_altered, alter, True), functools.partial(receive_altered, True))
    for text, _, usable, logits in (sent, received):
        assert usable
        assert torch.equal(logits, expected("llama", "greedy", 0.5))
        assert re.search(message, text), text
    assert received[1] == layer


def of_a_model_of_no_unicode(frames):
    """Whose name breaks whoever sends, prints or stores it."""
    frame = forged(frames[0].numpy().tobytes(), lambda metadata: metadata["model"].update(model_type="\ud800\x1b[31m"))
    return [torch.frombuffer(bytearray(frame), dtype=torch.uint8), *frames[1:]]


def test_a_refusal_of_any_words_arrives(pair):
    alter = of_a_model_of_no_unicode
    sent, received, took = pair(functools.partial(send_altered, alter, True), functools.partial(receive_altered, True))
    for text, _, usable, logits in (sent, received):
        assert usable and text.isprintable()
        assert re.search(r"another model: model_type is '\\ud800\\x1b\[31m', in config 'llama'", text), text
        assert torch.equal(logits, expected("llama", "greedy", 0.5))


class Bell(Exception):
    pass


def send_giving_up():
    with pytest.raises(Bell), CacheSender(new_cache_filled(), peer(), timeout=PATIENCE):
        raise Bell("\ud800\x1b[31m\x07" * 300)


def receive_given_up():
    with pytest.raises(TransferError) as caught:
        recv_cache(peer(), model("llama").config, timeout=PATIENCE)
    return str(caught.value)


def test_a_sender_gives_up_in_any_words(pair):
    _, text, _ = pair(send_giving_up, receive_given_up)
    assert "gave up before" in text and r"Bell: \ud800" in text
    assert text.isprintable() and len(text) < 700


@pytest.mark.parametrize("alter", [truncated, extended])
def test_payload_of_another_length(pair, kind, alter):
    if kind == "gloo":
        pytest.skip("gloo does not tell the length")
    sent, received, took = pair(functools.partial(send_altered, alter, True), functools.partial(receive_altered, True))
    for text, _, usable, logits in (sent, received):
        assert usable
        assert torch.equal(logits, expected("llama", "greedy", 0.5))
        assert re.search(r"layer 1: the payload has \d+ bytes, its header says \d+", text), text


@pytest.mark.parametrize(("alter", "message"), [(damaged_header, "CRC-32"), (huge, "more than the limit")])
def test_unreadable_headers(pair, alter, message):
    """Nothing is received by a header that is not sound: both sides say so, and the connection is closed."""
    sent, received, took = pair(
        functools.partial(send_altered, alter, False), functools.partial(receive_altered, False)
    )
    for text, layer, usable, _ in (sent, received):
        assert layer == 1
        assert not usable
        assert "layer 1" in text and message in text
    assert torch.equal(sent[3], expected("llama", "greedy", 0.5))
    assert took < 4 * TIMEOUT


def send_to_another_model():
    cache = new_cache_filled()
    with pytest.raises(TransferError, match="the header frame: .* refused it.*another model") as caught:
        send_cache(cache, peer(), timeout=PATIENCE)
    return caught.value.group_usable


def receive_another_model():
    with pytest.raises(TransferError, match="another model"):
        recv_cache(peer(), model("qwen3").config, timeout=PATIENCE)


def test_another_model(pair):
    assert pair(send_to_another_model, receive_another_model)[0]


# -- peers that die, stall or give up ---------------------------------------------------------------------------------


def kill():
    time.sleep(0.3)  # what was sent before arrives
    os.kill(os.getpid(), signal.SIGKILL)


def over_nccl():
    return dist.is_initialized() and "nccl" in str(dist.get_backend_config())


def timeout():
    return SLOW_START if over_nccl() else TIMEOUT


def device():
    """The model where the transport has its tensors."""
    return on_gpu() if over_nccl() else contextlib.nullcontext()


def stall():
    time.sleep(2 * timeout())


@contextlib.contextmanager
def before_layer_1(happens, sending):
    """`happens()` before this process writes layer 1's frame, or reads it."""
    frames, add = wire.frames, wire.Assembler.add

    def watched_frames(*args, **kwargs):
        for index, frame in enumerate(frames(*args, **kwargs)):
            if index == 2:
                happens()
            yield frame

    def watched_add(self, header, payload):
        if header.layer == 1:
            happens()
        return add(self, header, payload)

    if sending:
        wire.frames = watched_frames
    else:
        wire.Assembler.add = watched_add
    try:
        yield
    finally:
        wire.frames, wire.Assembler.add = frames, add


def send_with_fault(streamed, happens):
    """What sending raises, how long after the fault, and the cache's logits after it."""
    cache = new_cache("llama", "greedy", 0.5)
    fault = before_layer_1(happens, sending=True) if happens else contextlib.nullcontext()
    with device():
        with fault:
            if streamed:
                sender = CacheSender(cache, peer(), timeout=timeout())
                prefill("llama", cache)
                with pytest.raises(TransferError) as caught:
                    sender.finish()
            else:
                prefill("llama", cache)
                with pytest.raises(TransferError) as caught:
                    send_cache(cache, peer(), timeout=timeout())
        return str(caught.value), caught.value.layer, caught.value.group_usable, decode("llama", cache).cpu()


def receive_with_fault(happens):
    fault = before_layer_1(happens, sending=False) if happens else contextlib.nullcontext()
    with device(), fault, pytest.raises(TransferError) as caught:
        place = model("llama").device
        recv_cache(peer(), model("llama").config, timeout=timeout(), first_timeout=PATIENCE, device=place)
    return str(caught.value), caught.value.layer, caught.value.group_usable, None


def check_fault(outcome, message):
    text, layer, usable, _ = outcome
    assert layer == 1
    assert not usable
    assert re.search(message, text), text


def check_logits(logits, kind):
    """The sender's cache works as without a transfer."""
    with on_gpu() if kind == "nccl" else contextlib.nullcontext():
        assert torch.equal(logits, expected("llama", "greedy", 0.5).cpu())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("happens", "message"), [(kill, "lost {1}"), (stall, "{1} is stalled or slow")])
def test_receiver_fails(pair, kind, streamed, happens, message):
    """The sender says at which layer, in time, and its cache works on."""
    sent, received, took = pair(
        functools.partial(send_with_fault, streamed, None), functools.partial(receive_with_fault, happens)
    )
    check_fault(sent, f"layer 1: {message.format(*names(kind))}")
    check_logits(sent[3], kind)
    if happens is stall:  # it woke up, to find the connection closed
        check_fault(received, f"layer 1: lost {names(kind)[0]}")
    assert took < 5 * (SLOW_START if kind == "nccl" else TIMEOUT)


@pytest.mark.parametrize(("happens", "message"), [(kill, "lost {0}"), (stall, "{0} is stalled or slow")])
def test_sender_fails(pair, kind, happens, message):
    sent, received, took = pair(
        functools.partial(send_with_fault, False, happens), functools.partial(receive_with_fault, None)
    )
    check_fault(received, f"layer 1: {message.format(*names(kind))}")
    if happens is stall:
        check_fault(sent, f"layer 1: lost {names(kind)[1]}")
        check_logits(sent[3], kind)
    assert took < 5 * (SLOW_START if kind == "nccl" else TIMEOUT)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nccl"], indirect=True)
@pytest.mark.parametrize(("happens", "message"), [(stall, "{1} is stalled or slow"), (kill, "lost {1}")])
def test_receiver_fails_over_nccl(pair, kind, happens, message):
    test_receiver_fails(pair, kind, False, happens, message)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nccl"], indirect=True)
@pytest.mark.parametrize(("happens", "message"), [(stall, "{0} is stalled or slow"), (kill, "lost {0}")])
def test_sender_fails_over_nccl(pair, kind, happens, message):
    test_sender_fails(pair, kind, happens, message)


def send_half_a_prefill():
    """Prefill fails in layer 1; the group then serves another transfer."""
    cache = new_cache("llama", "greedy", 0.5)

    def fail(*_):
        raise ArithmeticError("no more")

    m = model("llama")
    m.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError), CacheSender(cache, peer(), timeout=PATIENCE):
        prefill("llama", cache, m)
    return send_whole("llama", "greedy", 0.5)[2]


def receive_after_half():
    with pytest.raises(TransferError, match="gave up before .*: ArithmeticError: no more") as caught:
        recv_cache(peer(), model("llama").config, timeout=PATIENCE)
    assert caught.value.group_usable
    return decode("llama", recv_cache(peer(), model("llama").config, timeout=PATIENCE))


def test_prefill_fails(pair):
    logits, received, _ = pair(send_half_a_prefill, receive_after_half)
    assert torch.equal(logits, received)


def wrong_arguments():
    cache = new_cache_filled()
    with pytest.raises(ValueError, match="timeout is a positive number"):
        send_cache(cache, peer(), timeout=0)
    with pytest.raises(ValueError, match="in_flight is a number of frames, 1 or more"):
        send_cache(cache, peer(), in_flight=0)
    if isinstance(peer(), int):
        with pytest.raises(ValueError, match="rank 0 is this process"):
            send_cache(cache, 0)
    else:
        with pytest.raises(ValueError, match="a group is that of a rank"):
            send_cache(cache, peer(), object())
        with pytest.raises(TypeError, match="a transport that can receive_head, got (Directory|Nixl)Sender"):
            recv_cache(peer(), model("llama").config)
    with pytest.raises(TypeError, match="the peer is a rank, or a transport that can send, got str"):
        send_cache(cache, "rank 1")


def nothing():
    pass


def test_wrong_arguments(pair):
    pair(wrong_arguments, nothing)
