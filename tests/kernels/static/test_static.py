"""A layer of fixed capacity, to which tokens are added one by one, against plain Python over all that came."""

import dataclasses
import itertools

import pytest
import torch
from reference import assert_one_byte_scales, error, frequencies, rotated

from spectrumkv_kernels import CODECS, Codec, Quantized, Rotary, split_frame, unpack
from spectrumkv_kernels.codec import reference as codec
from spectrumkv_kernels.codec.frame import balanced_frame
from spectrumkv_kernels.static import reference
from spectrumkv_kernels.static.layout import BASE, BLOCK, LENGTH, REFUSED, STATE, TICKET, Layout, Room

CODEC = {
    **CODECS,
    "rotated": Codec("rotated", center=False, hadamard=True, symmetric=False),
    "centred": Codec("centred", center=True, hadamard=False, symmetric=False),
}
SIZES = {16: 8, 8: 23, 4: 33}
"""Tokens of a block that go into each tier."""
EVERY = {16: 4, 8: 9, 4: 20, 3: 20, 2: 11}
POISON = 0xFF  # each dtype's NaN


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """Buffers, and all tokens that ever come.

    Args:
        sizes: Tokens of a block that go into each tier.
        pads: Padding tokens of each row.
        base, length: Of the state; what the tiers hold then stays unwritten.
        held: Tokens that each tier holds then.
        room: Places in each arena that are never used.
        greedy: Each row wants all its tokens in one arena, another one with each block.
    """

    def __init__(
        self, device="cpu", *, sizes=SIZES, pads=(0, 0), base=0, length=0, held=0, batch=2, kv_heads=2, key_dim=32,
        value_dim=32, dtype=torch.float32, capacity=200, recent=10, ring=None, sinks=3, score="kv_norm", decay=0.0,
        codec="spectrum", pairs=None, interleaved=False, room=3, greedy=False, seed=0,
    ):  # fmt: skip
        blocks = -(-capacity // BLOCK)
        rooms = tuple(Room(bits, held + n * blocks + room) for bits, n in sizes.items())
        pads = torch.tensor(pads)[:batch]
        self.layout = Layout(
            batch=batch, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype, capacity=capacity,
            ring=ring or (recent + BLOCK + 2 if rooms else capacity), rooms=rooms, recent_window=recent, sinks=sinks,
            padded=bool(pads.any()), ragged=False, score=score, decay=decay, codec=CODEC[codec],
            rotary=Rotary(frequencies(key_dim // 2 if pairs is None else pairs), interleaved),
        )  # fmt: skip
        self.buffer = torch.full((self.layout.size,), POISON, dtype=torch.uint8, device=device)
        self.state = torch.zeros(STATE, dtype=torch.int32, device=device)
        self.state[LENGTH], self.state[BASE] = length, base
        self.base, self.length, self.pads = base, length, pads.tolist()
        self.sizes, self.held, self.greedy = list(sizes.values()), held, greedy
        views = self.layout.views(self.buffer)
        views.pads.copy_(pads)
        # Of those rows that the prompt was tiered of; scales are positive.
        self.frame = randn(*views.frame.shape, seed=seed + 1)
        self.frame[..., key_dim:] = self.frame[..., key_dim:].abs() + 0.5
        if base:
            fixed = (pads < base)[:, None, None].to(device)
            views.frame.copy_(torch.where(fixed, self.frame.to(device), torch.nan))
        if rooms:
            steps = torch.arange(self.layout.blocks + 1)[:, None] * torch.tensor(self.sizes)
            views.totals.copy_(held + steps)
            self.own = self.shares(seed)
            views.own.copy_(self.own)
        at = torch.arange(capacity + 9).expand(batch, kv_heads, -1)
        noise = torch.rand(2, batch, kv_heads, capacity + 9, 1, generator=torch.Generator().manual_seed(seed + 2))
        keys = randn(batch, kv_heads, capacity + 9, key_dim, seed=seed + 3) * (0.5 + noise[0])
        if self.layout.codec.center:
            constant = 3 * randn(batch, kv_heads, 1, key_dim, seed=seed + 4)
            keys = keys + rotated(self.layout.rotary, constant.expand_as(keys), at).float()
        values = randn(batch, kv_heads, capacity + 9, value_dim, seed=seed + 5) * (0.5 + noise[1])
        self.keys, self.values = keys.to(dtype), values.to(dtype)
        for position in range(max(0, length - self.layout.ring), length):
            place = (position - self.base) % self.layout.ring
            views.keys[:, :, place], views.values[:, :, place] = self.keys[:, :, position], self.values[:, :, position]

    def shares(self, seed):
        """How many tokens of each row and block go into each arena: any numbers that the arenas can take."""
        draw = torch.Generator().manual_seed(seed)
        own = []
        for block in range(self.layout.blocks):
            own.append([])
            for pad in self.pads if self.layout.padded else [0]:
                left = BLOCK - min(max(pad - self.base - BLOCK * block, 0), BLOCK)
                shares = []
                if self.greedy:
                    arena = (block + pad) % len(self.sizes)
                    own[-1].append([left if i == arena else 0 for i in range(len(self.sizes))])
                    continue
                for size in self.sizes:
                    share = (
                        min(size, left) if not self.layout.padded else int(torch.randint(size + 1, (), generator=draw))
                    )
                    shares.append(min(share, left))
                    left -= shares[-1]
                own[-1].append(shares)
        return torch.tensor(own, dtype=torch.int32)

    @property
    def views(self):
        return self.layout.views(self.buffer)

    def append(self, implementation, count=1):
        for _ in range(count):
            token = slice(self.length, self.length + 1)
            keys, values = (t[:, :, token].to(self.buffer.device) for t in (self.keys, self.values))
            assert implementation.append(self.buffer, self.state, keys, values, self.layout) is None
            self.length += self.length < self.layout.capacity
        return self

    def frames(self):
        """Of each row, means in float64; each is fixed by the first block in which the row has tokens."""
        layout, expected = self.layout, self.frame.double()
        for row, pad in enumerate(self.pads):
            for block in range(layout.done(self.length, self.base)):
                start = self.base + BLOCK * block
                if pad < start:
                    continue
                stop = start + BLOCK + layout.recent_window + 1
                first = max(start, pad + (layout.sinks if stop - start > layout.sinks else 0))
                for head in range(layout.kv_heads):
                    expected[row, head] = self.frame_of(row, head, range(first, stop))
        return expected

    def frame_of(self, row, head, tokens):
        layout = self.layout
        sides = (self.keys, self.values) if layout.codec.balanced else (self.keys,)
        sound = [t for t in tokens if all(bool((s[row, head, t].double().abs() <= 65504).all()) for s in sides)]
        kept, at = self.keys[row, head, sound].double()[None], torch.tensor(sound)
        mean = rotated_back(layout.rotary, kept, -at).sum(-2) / max(1, len(sound))
        if not layout.codec.balanced:
            return mean[0]
        if not sound:
            parts = split_frame(torch.zeros(1, self.frame.shape[-1]), layout.key_dim)
            parts.key_scale.fill_(1), parts.value_scale.fill_(1)
            return torch.cat(parts, -1)[0]
        values, counted = self.values[row, head, sound].float(), torch.ones(1, 1, len(sound), dtype=torch.bool)
        frame = balanced_frame(kept[None].float(), values[None, None], at, layout.rotary, mean[None].float(), counted)
        return frame[0, 0]  # the function's own test compares with float64

    def chosen(self):
        """Positions that the blocks leave to each arena, by row and head: a list for each arena."""
        layout, found = self.layout, {}
        for row, head in itertools.product(range(layout.batch), range(layout.kv_heads)):
            arenas = [[] for _ in self.sizes]
            for block in range(layout.done(self.length, self.base)):
                start = self.base + BLOCK * block
                own = self.own[block][row if layout.padded else 0].tolist()
                for i, tokens in enumerate(self.split(row, head, start, own)):
                    arenas[i] += tokens
            found[row, head] = arenas
        return found

    def split(self, row, head, start, own):
        layout, pad = self.layout, self.pads[row]
        now = start + BLOCK + layout.recent_window + 1
        real, fill = [t for t in range(start, start + BLOCK) if t >= pad], range(start, min(pad, start + BLOCK))

        def score(t):
            if t < pad + layout.sinks:
                return float("inf")
            if layout.score == "recency":
                return t * 2.718281828459045 ** (-layout.decay * (now - t))
            key, value = self.keys[row, head, t].double().norm(), self.values[row, head, t].double().norm()
            ratio = float(value / key.clamp(min=1e-6)) * 2.718281828459045 ** (-layout.decay * (now - t))
            return 0.0 if ratio != ratio else ratio

        tiers, spare = {}, [size - mine for size, mine in zip(self.sizes, own, strict=True)]
        for tokens, counts in ((sorted(real, key=lambda t: -score(t)), own), (fill, spare)):
            arenas = [i for i, count in enumerate(counts) for _ in range(count)]
            for nth, t in enumerate(tokens):
                tiers[t] = arenas[nth] if nth < len(arenas) else len(own)
        order = iter(sorted(tiers, key=lambda t: (tiers[t], t)))
        return [sorted(itertools.islice(order, size)) for size in self.sizes]


def rotated_back(rotary, x, negated):
    """`R(-t) x`; `reference.rotations` takes no negative positions for what they are."""
    mirrored = dataclasses.replace(rotary, inv_freq=tuple(-f for f in rotary.inv_freq))
    return rotated(mirrored, x, (-negated).expand(x.shape[:-1]))


def codes_of(quantized, bits):
    return torch.cat(unpack(quantized.codes, bits), dim=-1).int()


def assert_frames(ours, theirs, layout, tolerance):
    """Each part of the frames on its own, as they differ in size."""
    parts = (layout.key_dim, layout.key_dim, layout.value_dim, 1) if layout.codec.balanced else (layout.key_dim,)
    for own, other in zip(ours.split(parts, -1), theirs.split(parts, -1), strict=True):
        assert error(own, other) < tolerance


def assert_alike(ours, theirs, bits, exact):
    """Codes, equal but where float32 arithmetic falls on the other side of a tie."""
    if exact:
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.affine, theirs.affine)
        return
    if ours.affine.dtype == torch.uint8:
        assert_one_byte_scales(ours, theirs, bits)
    else:
        torch.testing.assert_close(ours.affine.float(), theirs.affine.float(), rtol=2.0**-9, atol=2.0**-20)
    same = (ours.affine == theirs.affine).all(-1)
    assert same.float().mean() > 0.9
    differ = (codes_of(ours, bits) - codes_of(theirs, bits))[same].abs()
    assert differ.max() <= 1 and differ.float().mean() < 1e-3


def check(layer, exact=False):
    """All that lies in the buffers, `exact` as the reference would code it with the mean that is there."""
    layout, views, done = layer.layout, layer.views, layer.layout.done(layer.length, layer.base)
    state = [0] * STATE
    state[LENGTH], state[BASE] = layer.length, layer.base
    assert layer.state.tolist() == state
    views = layout.views(layer.buffer.cpu())
    tail = torch.arange(max(0, layer.length - layout.ring), layer.length)
    assert torch.equal(views.keys[:, :, (tail - layer.base) % layout.ring], layer.keys[:, :, tail])
    assert torch.equal(views.values[:, :, (tail - layer.base) % layout.ring], layer.values[:, :, tail])
    if not layout.rooms:
        return
    assert views.totals.tolist() == [
        [layer.held + n * block for n in layer.sizes] for block in range(layout.blocks + 1)
    ]
    assert torch.equal(views.own, layer.own)
    if layout.codec.center and done:
        assert_frames(views.frame, layer.frames(), layout, 1e-5)
    chosen = layer.chosen()
    for i, (arena, size) in enumerate(zip(views.arenas, layer.sizes, strict=True)):
        filled = slice(layer.held, layer.held + size * done)
        wanted = torch.tensor(
            [[chosen[row, head][i] for head in range(layout.kv_heads)] for row in range(layout.batch)]
        )
        wanted = wanted.view(layout.batch, layout.kv_heads, -1).long()
        assert arena.positions[:, :, filled].tolist() == wanted.tolist()
        keys, values = (codec.take(t, wanted) for t in (layer.keys, layer.values))
        if arena.bits == 16:
            assert torch.equal(arena.keys[:, :, filled], keys) and torch.equal(arena.values[:, :, filled], values)
            parts = [arena.keys, arena.values, arena.positions]
        else:
            expected = codec.encode(
                keys, values, wanted.int(), arena.bits, layout.codec, views.frame if layout.codec.center else None,
                layout.rotary,
            )  # fmt: skip
            real = wanted >= torch.tensor(layer.pads)[:, None, None]  # padding may have come before the mean was fixed
            for stored, theirs in zip((arena.keys, arena.values), expected, strict=True):
                if real.any():
                    ours = (t[:, :, filled][real] for t in stored)
                    assert_alike(Quantized(*ours), Quantized(*(t[real] for t in theirs)), arena.bits, exact)
            parts = [*arena.keys, *arena.values, arena.positions]
        for part in parts:
            for rest in (part[:, :, : layer.held], part[:, :, filled.stop :]):
                assert bool((rest.contiguous().view(torch.uint8) == POISON).all())


LAYERS = {  # what it is, and tokens to add
    "from nothing": ({}, 160),
    "no block is due": ({}, 75),
    "the first block is due": ({}, 76),
    "after a prompt": ({"base": 37, "length": 50, "held": 5}, 100),
    "no recent window": ({"recent": 0, "sinks": 0}, 140),
    "bfloat16": ({"dtype": torch.bfloat16, "key_dim": 64, "value_dim": 16}, 80),
    "float16 of 80 and 96 channels": ({"dtype": torch.float16, "key_dim": 80, "value_dim": 96, "pairs": 20}, 80),
    "interleaved": ({"interleaved": True, "pairs": 8}, 80),
    "no rotation": ({"pairs": 0}, 80),
    "absmax": ({"codec": "absmax", "value_dim": 64}, 80),
    "rotated": ({"codec": "rotated"}, 80),
    "centred": ({"codec": "centred"}, 80),
    "balanced": ({"codec": "spectrum2", "sizes": EVERY}, 160),
    "balanced, after a prompt": ({"codec": "spectrum2", "base": 37, "length": 50, "held": 5}, 100),
    "balanced, interleaved": ({"codec": "spectrum2", "interleaved": True, "pairs": 8, "value_dim": 64}, 80),
    "balanced, bfloat16": ({"codec": "spectrum2", "dtype": torch.bfloat16, "key_dim": 80, "sizes": EVERY}, 80),
    "balanced, no rotation": ({"codec": "spectrum2", "pairs": 0, "sizes": {3: 64}}, 80),
    "balanced, rows that begin late": ({"codec": "spectrum2", "pads": (5, 71), "recent": 3}, 200),
    "rows that want more of a tier than it takes": (
        {"codec": "spectrum2", "sizes": EVERY, "pads": (9, 70), "recent": 3, "greedy": True},
        200,
    ),
    "recency": ({"score": "recency", "codec": "absmax"}, 150),
    "decay": ({"decay": 0.01}, 80),
    "padding": ({"pads": (5, 30)}, 145),
    "a row that begins late": ({"pads": (0, 71), "recent": 3}, 200),
    "rows that begin with a block": ({"pads": (64, 128), "recent": 2}, 200),
    "padding after a prompt": ({"pads": (60, 3), "base": 40, "length": 55, "held": 2, "sinks": 6}, 145),
    "more sinks than a block": ({"sinks": 70}, 80),
    "some are dropped": ({"sizes": {16: 5, 4: 20}, "codec": "rotated"}, 145),
    "some are dropped, with padding": ({"sizes": {8: 11, 2: 30}, "pads": (9, 68)}, 145),
    "a tier takes none": ({"sizes": {16: 0, 8: 0, 4: 64}}, 80),
    "exact": ({"sizes": {16: 64}}, 80),
    "one row and head": ({"batch": 1, "kv_heads": 1, "pads": (0,)}, 80),
    "three heads": ({"batch": 1, "kv_heads": 3, "pads": (7,), "ring": 129}, 160),
    "all that fit": ({"sizes": {}, "capacity": 40}, 40),
    "a window": ({"sizes": {}, "ring": 13}, 60),
    "a window after a prompt": ({"sizes": {}, "ring": 13, "length": 100, "base": 87}, 20),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_what_lies_where(name):
    options, count = LAYERS[name]
    check(Layer(**options).append(reference, count), exact=True)


def test_many_blocks_in_a_row():
    layer = Layer(capacity=300)
    for _ in range(10):
        check(layer.append(reference, 30), exact=True)


def refused(implementation, device, **options):
    """A full layer, after three more tokens."""
    layer = Layer(device, capacity=80, length=73, **options).append(implementation, 7)
    before, state = layer.buffer.clone(), layer.state.clone()
    layer.append(implementation, 3)
    assert torch.equal(layer.buffer, before)
    state[REFUSED] = 3
    assert torch.equal(layer.state, state) and state[LENGTH] == 80 and state[TICKET] == 0
    return layer


@pytest.mark.parametrize("options", [{}, {"sizes": {}}, {"sizes": {}, "ring": 7}], ids=["tiers", "exact", "window"])
def test_a_full_layer_takes_no_more(options):
    refused(reference, "cpu", **options)


def flawed(device, codec="spectrum"):
    """Tokens with what no code stands for in the first block: in one head a key, in another a value."""
    layer = Layer(device, dtype=torch.bfloat16, sizes={16: 20, 8: 20, 4: 24}, sinks=0, codec=codec)
    layer.keys[0, 1, 7, 3] = torch.nan
    layer.keys[0, 0, 70, 3] = 1e6  # not of the block, but before the mean is fixed
    layer.keys[1, 0, 9, 31] = -torch.inf
    layer.values[1, 1, 5, 0] = torch.inf
    return layer


@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_flawed_tokens_do_not_count(codec):
    layer = flawed("cpu", codec).append(reference, 76)
    views, chosen = layer.views, layer.chosen()
    assert_frames(views.frame, layer.frames(), layer.layout, 1e-5)
    for row, head in chosen:
        for arena, wanted in zip(views.arenas, chosen[row, head], strict=True):
            assert arena.positions[row, head, : len(wanted)].tolist() == wanted
    assert 7 in chosen[0, 1][2] and 9 in chosen[1, 0][2]  # the lowest scores
    assert 5 in chosen[1, 1][0]
