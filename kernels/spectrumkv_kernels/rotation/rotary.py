"""Rotary matrices R(t) of a model, for centring keys in the frame before RoPE."""

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from ..backend.tensor_cache import keep_longest

SMALLEST_TABLE = 2048
"""Positions of a table; it doubles as longer sequences come."""
LARGEST_TABLE = 1 << 15
"""Positions up to which it does in any case; beyond, only where as many are asked for, since a layer with a window has
few tokens however far the sequence has come."""


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

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Kept, because every read looks its tables up."""
        return hash((self.inv_freq, self.interleaved))

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First and second channels of the rotated pairs, `[..., pairs]` each, and those that are not rotated."""
        pairs = len(self.inv_freq)
        if self.interleaved:
            return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2], x[..., 2 * pairs :]
        return x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """`R(t) x`, or `R(-t) x`.

        Args:
            x: float32 `[..., tokens, channels]`; its tokens may be 1, for one vector at every position.
            positions: integers `[..., tokens]`, broadcast against `x`; negative ones count as 0.
        """
        if not self.inv_freq:
            return x.expand(*torch.broadcast_shapes(x.shape[:-1], positions.shape), x.shape[-1])
        positions = positions.clamp(min=0).long()
        length = int(positions.max()) + 1 if positions.numel() else 1
        if length <= max(LARGEST_TABLE, positions.numel()):
            turn = self.table(length, x.device)[positions]
        else:
            turn = _turns(self.inv_freq, positions.to(x.device))
        cos, sin = turn.chunk(2, dim=-1)
        first, second, rest = self._split(x)
        # Not one complex product: its rounding depends on how many there are, and a token's bits must not.
        sin = -sin if inverse else sin
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned = turned.flatten(-2) if self.interleaved else turned.transpose(-1, -2).flatten(-2)
        return torch.cat((turned, rest.expand(*turned.shape[:-1], -1)), -1) if rest.shape[-1] else turned

    def paired(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over both channels of each pair, for both; others as they are: `[..., channels]`."""
        if not self.inv_freq:
            return x
        first, second, rest = self._split(x)
        mean = (first + second) / 2
        both = torch.stack((mean, mean), -1).flatten(-2) if self.interleaved else torch.cat((mean, mean), -1)
        return torch.cat((both, rest), -1)

    def scores(self, query: torch.Tensor, mean: torch.Tensor, length: int, start: int = 0) -> torch.Tensor:
        """`q . R(t) mean` for every position `start <= t < length`.

        Args:
            query: float32 `[..., rows, channels]`.
            mean: float32 `[..., channels]`.

        Returns:
            float32 `[..., rows, length - start]`.
        """
        if not self.inv_freq:
            return (query @ mean.unsqueeze(-1)).expand(*query.shape[:-1], length - start)
        x, y, query_rest = self._split(query)
        mean_x, mean_y, mean_rest = self._split(mean.unsqueeze(-2))
        # Re(conj(q) m exp(i t f)), summed over pairs: one product with a table that all layers and heads share.
        cos = torch.addcmul(x * mean_x, y, mean_y)
        sin = torch.addcmul(y * mean_x, x, mean_y, value=-1)
        if length <= max(LARGEST_TABLE, 2 * (length - start)):
            turns = self.table(length, query.device)[start:length]
        else:
            turns = _turns(self.inv_freq, torch.arange(start, length, device=query.device))
        scores = linear(torch.cat((cos, sin), dim=-1), turns)
        return scores + query_rest @ mean_rest.transpose(-1, -2) if query_rest.shape[-1] else scores

    def table(self, length: int, device: torch.device) -> torch.Tensor:
        """Cosines, then sines of `t inv_freq`: float32 `[length or more, 2 * pairs]`, kept for all caches."""
        return _table(length, self, device)

    def steps(self, step: int, length: int, device: torch.device) -> torch.Tensor:
        """A table that is short however far positions go: `exp(i t f) = exp(i step (t // step) f) exp(i (t % step) f)`.

        Args:
            step: Positions that share a coarse angle.
            length: Positions to cover.

        Returns:
            float32 `[step + length / step or more, 2 * pairs]`, kept for all caches: cosines, then sines, of the
            positions below `step`, then of every `step`th one.
        """
        return _steps(length, step, self, device)


@keep_longest(SMALLEST_TABLE)
def _table(length: int, rotary: Rotary, device: torch.device) -> torch.Tensor:
    return _turns(rotary.inv_freq, torch.arange(length)).to(device)


@keep_longest(4096)
def _steps(length: int, step: int, rotary: Rotary, device: torch.device) -> torch.Tensor:
    return _turns(rotary.inv_freq, torch.cat((torch.arange(step), torch.arange(0, length, step)))).to(device)


def _turns(inv_freq: tuple[float, ...], positions: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines of the angles at `positions`, `[...]`: float32 `[..., 2 * pairs]`.

    Exact to float32 rounding: float32 angles would be off by 1e-3 at position 32k.
    """
    angles = positions.double()[..., None] * torch.tensor(inv_freq, dtype=torch.float64, device=positions.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
