"""References in float64, and in Python's integers, that tests share."""

import torch

from spectrumkv_kernels import dequantize


def error(x, y):
    """Relative error, `rms(x - y) / rms(y)`."""
    assert x.shape == y.shape
    return ((x.double() - y.double()).square().mean() / y.double().square().mean()).sqrt().item()


def sylvester(channels):
    """The orthonormal Hadamard matrix, block-diagonal where `channels` is no power of two."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while channels % (2 * len(block)) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.block_diag(*[block / len(block) ** 0.5] * (channels // len(block)))


def frequencies(pairs, theta=10000.0):
    return tuple(theta ** (-i / pairs) for i in range(pairs))


def rotations(rotary, positions, channels):
    """The matrices `R(t)`, `[*positions.shape, channels, channels]`."""
    matrices = torch.eye(channels, dtype=torch.float64).repeat(*positions.shape, 1, 1)
    pairs = len(rotary.inv_freq)
    for i, frequency in enumerate(rotary.inv_freq):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + pairs)
        angle = positions.clamp(min=0).double() * frequency
        matrices[..., a, a] = matrices[..., b, b] = angle.cos()
        matrices[..., b, a] = angle.sin()
        matrices[..., a, b] = -angle.sin()
    return matrices


def rotated(rotary, x, positions):
    """`R(t) x` for one position of each vector."""
    return (rotations(rotary, positions, x.shape[-1]) @ x.double().unsqueeze(-1)).squeeze(-1)


def rounding_bound(x, bits, symmetric):
    """Largest error that rounding to nearest may have in each vector, float16 scale and zero included."""
    x = x.double()
    half, tiny = 2.0**-11, 2.0**-25  # float16 rounding: of normal numbers, relative, and of subnormal ones
    if symmetric:
        steps = 2 ** (bits - 1) - 1
        scale, zero_error = x.abs().amax(-1) / steps, 0.0
    else:
        steps = 2**bits - 1
        scale, zero_error = (x.amax(-1) - x.amin(-1)) / steps, half * x.amin(-1).abs() + tiny
    scale_error = half * scale + tiny
    return (scale + scale_error) / 2 + steps * scale_error + zero_error + 1e-6 * x.abs().amax(-1)


def digest_sums(words):
    """Of unsigned 64-bit words, the sums of rows and of columns, as docs/wire-format.md words them."""
    mask, state, weights = 2**64 - 1, 0, []
    for _ in range(1024):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        weights.append((z ^ z >> 31) | 1)
    rows = [words[i : i + 1024] for i in range(0, len(words), 1024)]
    sums = [sum(w * a for w, a in zip(row, weights, strict=False)) & mask for row in rows]
    columns = [0] * 1024
    for row in rows:
        for c, word in enumerate(row):
            columns[c] += word
    return [*sums, *(c & mask for c in columns)]


def frame_for(codec, mean, value_dim, seed=0):
    """A frame of a codec with this mean of keys, float32 `[batch, kv_heads, frame_size]`; None where it has none."""
    if not codec.center:
        return None
    if not codec.balanced:
        return mean
    generator = torch.Generator().manual_seed(seed + 5)
    rows = mean.shape[:-1]
    key_scale = 0.5 + 1.5 * torch.rand(mean.shape, generator=generator)
    value_mean = torch.randn(*rows, value_dim, generator=generator)
    return torch.cat((mean, key_scale, value_mean, 0.5 + torch.rand(*rows, 1, generator=generator)), dim=-1)


def assert_one_byte_scales(ours, theirs, bits):
    """Scales of unbiased codes, equal up to a step where sums come in another order; both are `Quantized`.

    A few vectors are rounded about as well with two of the steps that are tried. Scales then differ by more, but what
    is restored is as long: its product with the vector is the same, and so is nearly the error.
    """
    near = (ours.affine.int() - theirs.affine.int()).abs().squeeze(-1) <= 1
    lengths, expected = (dequantize(stored, bits).norm(dim=-1) for stored in (ours, theirs))
    assert bool((near | ((lengths / expected).log2().abs() <= 1.5 / 32)).all())
    assert int((~near).sum()) <= max(2, 0.02 * near.numel())
