"""Caches as bytes: whole, in a file, or frame by frame while prefill still runs. See docs/wire-format.md.

A stream is a header frame, a frame for each layer, and an end frame. A buffer, a file and a socket carry the same
bytes. `write` and `read` work on caches, `layer` and `stock` on one layer, `frame` and `payload` on bytes; `mac`
authenticates them by a key, and `patch` lifts tokens of a received cache to a higher tier.
"""

from spectrumkv_hf.wire.frame import Buffer, FrameHeader, Kind, WireError
from spectrumkv_hf.wire.mac import KeyRefused
from spectrumkv_hf.wire.patch import ExactCopy, request
from spectrumkv_hf.wire.read import Assembler, deserialize, load
from spectrumkv_hf.wire.write import Emitter, FrameWriter, frames, layer_frame, save, serialize

__all__ = [
    "Assembler",
    "Buffer",
    "Emitter",
    "ExactCopy",
    "FrameHeader",
    "FrameWriter",
    "KeyRefused",
    "Kind",
    "WireError",
    "deserialize",
    "frames",
    "layer_frame",
    "load",
    "request",
    "save",
    "serialize",
]
