"""MACs: keyed BLAKE2b, by which those who share a key know each other's bytes. See docs/wire-format.md."""

import hashlib
import hmac

import torch

from spectrumkv_hf.wire.frame import MAC_BYTES, NO_KEY, FrameHeader, Kind, WireError, host_bytes

KEY_BYTES = range(16, 65)
"""How long keys may be."""


class KeyRefused(WireError):
    """A MAC of another key, none where there has to be one, or one that cannot be checked without a key."""


def check_key(key: object) -> bytes | None:
    """What was given as a key, if it is one, or None.

    Raises:
        ValueError: it is something else.
    """
    if key is None or (isinstance(key, bytes) and len(key) in KEY_BYTES):
        return key
    given = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
    raise ValueError(f"key is {KEY_BYTES[0]} to {KEY_BYTES[-1]} bytes, or None, got {given}")


def mac(key: bytes | None, purpose: bytes, *parts: bytes | memoryview, size: int = MAC_BYTES) -> bytes:
    """The MAC of some bytes, one behind the other; without a key a checksum.

    Args:
        key: As `check_key` takes it.
        purpose: Of these bytes, at most 16: what was made for one passes for nothing else.
        parts: Of any lengths: that they can't be cut otherwise is the caller's concern.
        size: Bytes of the MAC.
    """
    state = hashlib.blake2b(key=key or b"", digest_size=size, person=purpose)
    for part in parts:
        state.update(part)
    return state.digest()


def key_id(key: bytes | None) -> bytes:
    """Tells keys apart, so that bytes of another key are not taken for damaged ones; zeros without a key."""
    return NO_KEY if key is None else mac(key, b"key id", size=len(NO_KEY))


def check_key_id(theirs: bytes, key: bytes | None, reader: str = "the reader") -> None:
    """Refuse what says that it has the MAC of this key, where it is another's; without a key, what has any.

    Raises:
        KeyRefused: it does not fit.
    """
    if theirs == key_id(key):
        return
    if key is None:
        raise KeyRefused(f"it has a MAC, and {reader} has no key to check it")
    raise KeyRefused("it has a MAC of another key" if any(theirs) else "it has no MAC")


def is_same(mac: bytes, other: bytes) -> bool:
    """Whether two MACs are equal; how long that takes does not tell where they differ."""
    return hmac.compare_digest(mac, other)


class FrameMacs:
    """The MACs of the frames of one stream, or of a frame outside any; without a key they have none.

    A MAC is of a frame's header and padded payload, that of an end frame of all MACs before it besides. So no frame can
    be changed, moved, left out or taken from another stream. It is computed on the host, to which payloads on a device
    are copied for it.

    Args:
        key: 16 to 64 bytes, or None.

    Attributes:
        key_id: For the frames' headers.
        size: Bytes of a MAC, 0 without a key.

    Raises:
        ValueError: the key is none.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = check_key(key)
        self.key_id, self.size = key_id(key), 0 if key is None else MAC_BYTES
        self._made: dict[int, bytes] = {}

    def pieces(self, header: FrameHeader, payload: torch.Tensor, at: int = 0) -> list[tuple[int, bytes]]:
        """What stands before and behind a payload, uint8 `[header.padded]`, in a frame that begins at byte `at`."""
        pieces = [(at, header.pack())]
        if self._key is not None:
            pieces.append((at + FrameHeader.SIZE + header.padded, self._make(header, payload)))
        return pieces

    def check_key(self, header: FrameHeader) -> None:
        """Refuse a frame without a MAC of this key, by what its header says alone; without a key, one with any MAC.

        Raises:
            KeyRefused: it is one.
        """
        check_key_id(header.key_id, self._key)

    def check(self, header: FrameHeader, data: torch.Tensor) -> torch.Tensor:
        """The padded payload of a frame, once its MAC is right.

        Args:
            header: Of the frame.
            data: What follows it, uint8 `[header.rest]`.

        Raises:
            KeyRefused: as of `check_key`.
            WireError: the MAC is wrong, or the length.
        """
        self.check_key(header)
        if self._key is None:
            return data
        if len(data) != header.rest:
            raise WireError(f"{len(data)} bytes of payload and MAC where its header says {header.rest}")
        payload = data[: header.padded]
        if not is_same(self._make(header, payload), host_bytes(data[header.padded :])):
            raise WireError("its MAC is wrong: it is damaged, forged, or of another stream")
        return payload

    def _make(self, header: FrameHeader, payload: torch.Tensor) -> bytes:
        earlier = [index for index in sorted(self._made) if index < header.index and header.kind == Kind.END]
        data, others = payload.cpu().numpy().data, [self._made[index] for index in earlier]
        self._made[header.index] = made = mac(self._key, b"frame", header.pack(), data, *others)
        return made
