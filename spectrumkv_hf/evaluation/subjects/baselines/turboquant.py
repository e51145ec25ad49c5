"""TurboQuant-like: the variant of TurboQuant (arXiv 2504.19874) that is for least squared error.

A vector, a token's key after RoPE or its value, is divided by its norm and multiplied by a random orthogonal matrix. A
coordinate is then nearly normal with a variance of 1 / head_dim, whatever the vector was, and is rounded to the nearest
of the levels by Lloyd and Max for that distribution. Stored are the codes and the norm, a float16.

The rotation is the Q of a matrix of normal numbers from a fixed seed, for any head_dim. All layers and caches share its
`head_dim**2` float32, which are not counted among a cache's bytes.

Not as published: levels are those of the normal distribution for every dimension, no channels are set apart as outliers
with more bits, there is no sign bit of the residual (the paper's variant for inner products), and the last few new
tokens are exact, as they are for the methods beside it.
"""

import functools

import torch

from spectrumkv_hf.evaluation.subjects.baselines.coded import Coded, TensorFormat
from spectrumkv_kernels import FLOAT16_MAX, pack, unpack
from spectrumkv_kernels.backend.tensor_cache import keep

BITS = 4, 3, 2
"""The default first."""

SEED = 0


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The `2**bits` levels of least squared error for a standard normal variable, in ascending order."""
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    moved = torch.inf
    while moved > 1e-13:
        edges = torch.cat((levels.new_tensor([-torch.inf]), _between(levels), levels.new_tensor([torch.inf])))
        density = (-edges.square() / 2).exp() / (2 * torch.pi) ** 0.5
        centroids = -density.diff() / torch.special.ndtr(edges).diff()
        levels, moved = centroids, (centroids - levels).abs().max().item()
    return tuple(levels.tolist())


def _between(levels: torch.Tensor) -> torch.Tensor:
    return (levels[1:] + levels[:-1]) / 2


@keep(16)
@torch.inference_mode(False)  # it outlives the mode in which it is asked for first
def rotation(channels: int, device: torch.device) -> torch.Tensor:
    """A random orthogonal matrix, float32 `[channels, channels]`, the same whenever it is made."""
    generator = torch.Generator().manual_seed(SEED)
    q, r = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().to(device)  # without the signs it would not be uniformly distributed


class TurboQuant(TensorFormat):
    """Vectors by norm and rounded direction.

    Args:
        bits: Of a coordinate.
    """

    joins = True

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Packed codes, and norms `[batch, kv_heads, tokens, 1]`."""
        x = x.float()
        norms = x.norm(dim=-1, keepdim=True)
        turned = x / norms.clamp(min=torch.finfo(torch.float32).tiny) @ rotation(x.shape[-1], x.device)
        codes = torch.bucketize(turned * x.shape[-1] ** 0.5, _between(self._levels(x.device)), out_int32=True)
        return pack(codes.to(torch.uint8), self.bits), norms.clamp(max=FLOAT16_MAX).half()

    def decode(self, stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        codes, norms = stored
        turned = self._levels(codes.device)[torch.cat(unpack(codes, self.bits), dim=-1).int()] / shape[-1] ** 0.5
        return (turned @ rotation(shape[-1], codes.device).T * norms.float()).to(dtype)

    def _levels(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(lloyd_max(self.bits), device=device)


def parse(spec: str, rest: str) -> Coded:
    """`turboquant[:BITS]`.

    Raises:
        ValueError: no such width.
    """
    if rest not in ("", *map(str, BITS)):
        raise ValueError(f"method {spec!r}: turboquant takes {', '.join(map(str, BITS))} bits, got {rest!r}")
    return Coded(spec, functools.partial(TurboQuant, int(rest or BITS[0])))
