"""FP8 keys and values as vLLM's `--kv-cache-dtype fp8_e4m3` and `fp8_e5m2` store them.

vLLM takes one scale a layer for keys and one for values, from a calibrated checkpoint, and 1 where there is none. Here
a scale comes from the tensor itself, the best that calibration could find; `unscaled` is the other case. Unlike in
vLLM, the last few new tokens are exact, as they are for the methods beside it.
"""

from functools import partial

import torch

from spectrumkv_hf.evaluation.subjects.baselines.coded import Coded, TensorFormat

FORMATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Float8(TensorFormat):
    """A float8 format.

    Args:
        dtype: One of `FORMATS`.
        scaled: One scale for each tensor that is encoded; False: values are cast as they are, and saturate.
    """

    bits = 8

    def __init__(self, dtype: torch.dtype, scaled: bool) -> None:
        self.dtype, self.scaled = dtype, scaled

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes, and the scale, a float32, where there is one."""
        largest = torch.finfo(self.dtype).max
        if not self.scaled:
            return (x.clamp(-largest, largest).to(self.dtype),)
        scale = (x.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
        return (x.float() / scale).clamp(-largest, largest).to(self.dtype), scale

    def decode(self, stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        codes, *scale = stored
        return (codes.float() * scale[0] if scale else codes).to(dtype)


def parse(spec: str, rest: str) -> Coded:
    """`fp8_e4m3[:unscaled]` or `fp8_e5m2[:unscaled]`.

    Raises:
        ValueError: something else follows.
    """
    name = spec.partition(":")[0]
    if rest not in ("", "unscaled"):
        raise ValueError(f"method {spec!r}: write {name} or {name}:unscaled")
    return Coded(spec, partial(Float8, FORMATS[name], not rest))
