"""Rotary matrices R(t) of a model, for centring keys in the frame before RoPE."""

import functools
from dataclasses import dataclass

import torch

BLOCK = 64
"""Positions per block of the factorisation `R(64 a + b) = R(64 a) R(b)`, which keeps the tables small."""


@dataclass(frozen=True)
class Rotary:
    """The rotation that RoPE applies at position `t`: channel pair `i` turns by `t * inv_freq[i]` radians.

    A constant factor that a model puts on cos and sin (YaRN) is left out: the mean absorbs it.

    Attributes:
        inv_freq: Radians per position, one for each rotated pair. Empty: R(t) is the identity.
        interleaved: Pairs are channels `(2i, 2i + 1)` (GPT-J, Cohere, GLM) rather than `(i, i + n)` (Llama, NeoX),
            `n` being the number of pairs. Channels past the pairs are not rotated.
    """

    inv_freq: tuple[float, ...] = ()
    interleaved: bool = False

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs = len(self.inv_freq)
        rest = x[..., 2 * pairs :]
        if self.interleaved:
            return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2], rest
        return x[..., :pairs], x[..., pairs : 2 * pairs], rest

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second, rest = self._split(x)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat((joined, rest.expand(*joined.shape[:-1], rest.shape[-1])), -1)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """`R(t) x`, or `R(-t) x`.

        Args:
            x: float32 `[..., tokens, channels]`; its tokens may be 1, for one vector at every position.
            positions: integers `[..., tokens]`, broadcast against `x`; negative ones count as 0.
        """
        if not self.inv_freq:
            return x.expand(*torch.broadcast_shapes(x.shape[:-1], positions.shape), x.shape[-1])
        positions = positions.clamp(min=0).long()
        coarse_cos, coarse_sin = self._coarse(int(positions.max()) // BLOCK + 1 if positions.numel() else 1, x.device)
        fine_cos, fine_sin = _table(self.inv_freq, 1, BLOCK, x.device)
        block, step = positions // BLOCK, positions % BLOCK
        cos_a, sin_a, cos_b, sin_b = coarse_cos[block], coarse_sin[block], fine_cos[step], fine_sin[step]
        cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
        return self._turn(x, cos, -sin if inverse else sin)

    def scores(self, query: torch.Tensor, mean: torch.Tensor, length: int) -> torch.Tensor:
        """`q . R(t) mean` for every position `t < length`.

        Args:
            query: float32 `[..., rows, channels]`.
            mean: float32 `[..., channels]`.

        Returns:
            float32 `[..., rows, length]`.
        """
        if not self.inv_freq:
            return (query @ mean.unsqueeze(-1)).expand(*query.shape[:-1], length)
        blocks = -(-length // BLOCK)
        coarse_cos, coarse_sin = self._coarse(blocks, query.device)
        turned_query = self._turn(query.unsqueeze(-2), coarse_cos[:blocks], -coarse_sin[:blocks])
        turned_mean = self._turn(mean.unsqueeze(-2), *_table(self.inv_freq, 1, BLOCK, query.device))
        scores = turned_query.flatten(-3, -2) @ turned_mean.transpose(-1, -2)  # [..., rows * blocks, BLOCK]
        return scores.unflatten(-2, (query.shape[-2], blocks)).flatten(-2)[..., :length]

    def _coarse(self, blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return _table(self.inv_freq, BLOCK, 1 << max(blocks - 1, 31).bit_length(), device)


@functools.lru_cache(maxsize=64)
def _table(
    inv_freq: tuple[float, ...], step: int, count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `i * step * inv_freq` for `i < count`, float32 `[count, pairs]`, exact to float32 rounding."""
    positions = torch.arange(count, dtype=torch.float64) * step
    angles = positions[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
    return angles.cos().float().to(device), angles.sin().float().to(device)
