"""The Triton attention over layers of fixed capacity against the reference in torch, natively where there is a GPU."""

import functools

import pytest
import torch
from reference import error, frequencies

from spectrumkv_kernels import CODECS, Codec, Rotary
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.static import reference
from spectrumkv_kernels.static.layout import BASE, BLOCK, LENGTH, REFUSED, STATE, Layout, Room

attend_triton = pytest.importorskip("spectrumkv_kernels.static.triton_attend")
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Queries and weights are rounded to 11 bits, and the output to its own dtype."""
ROOMS = (Room(16, 8), Room(8, 80), Room(4, 320))
RECENT, RING, SINKS, CAPACITY = 8, 80, 4, 450
BLOCKS = [RECENT + 2 + BLOCK * block for block in range(1, 7)]
"""Tokens seen when the last of each block has just been tiered."""
LENGTHS = [1, BLOCKS[0] - 1, BLOCKS[0], BLOCKS[1] + 33, CAPACITY]
"""The ring has wrapped in the last two."""
FEW = LENGTHS[1::3]
CODEC = {**CODECS, "rotated": Codec("rotated", center=False, hadamard=True, symmetric=False)}


def cases(values, quick):
    """Parameters, of which only the quick ones run in Triton's interpreter but in `make test-slow`."""
    hidden = () if torch.cuda.is_available() else pytest.mark.slow
    return [pytest.param(*(v if isinstance(v, list) else [v]), marks=() if v in quick else hidden) for v in values]


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    """What is not called by its name is the reference."""
    monkeypatch.setenv(VARIABLE, "torch")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layout_of(
    rooms=ROOMS, *, batch=1, kv_heads=2, head_dim=64, value_dim=None, dtype=torch.float32, capacity=CAPACITY, ring=RING,
    padded=False, codec="spectrum", interleaved=False,
):  # fmt: skip
    rotary = Rotary(frequencies(head_dim // 2 - head_dim // 8), interleaved)
    return Layout(
        batch, kv_heads, head_dim, value_dim or head_dim, dtype, capacity, ring, rooms, RECENT, SINKS, padded, False,
        "kv_norm", 0.0, CODEC[codec], rotary,
    )  # fmt: skip


def empty(layout, pads=None):
    """A buffer that holds tables and else NaN, and the state of a layer without tokens."""
    buffer, state = torch.full((layout.size,), 0xFF, dtype=torch.uint8), torch.zeros(STATE, dtype=torch.int32)
    views = layout.views(buffer)
    views.totals.zero_()
    for block in range(layout.blocks):
        sizes = [4 if block == 0 else 0, 12, 48 if block == 0 else 52]
        views.totals[block + 1] = views.totals[block] + torch.tensor(sizes, dtype=torch.int32)
        views.own[block] = views.totals[block + 1] - views.totals[block]
    views.pads.zero_()
    if pads is not None:
        views.pads.copy_(torch.tensor(pads))
        views.own[0, :, -1] -= views.pads  # the least precise arena has a place for all padding
    return buffer, state


def token(layout, length):
    """Keys with a mean, and values, of the token at a position."""
    keys = randn(layout.batch, layout.kv_heads, 1, layout.key_dim, seed=2 * length) + 1
    values = randn(layout.batch, layout.kv_heads, 1, layout.value_dim, seed=2 * length + 1)
    return keys.to(layout.dtype), values.to(layout.dtype)


@functools.lru_cache(maxsize=4)
def filled(layout, lengths=tuple(LENGTHS), pads=None):
    """Buffer and state at each of some lengths."""
    (buffer, state), found = empty(layout, pads), {}
    for length in range(max(lengths)):
        reference.append(buffer, state, *token(layout, length), layout)
        if length + 1 in lengths:
            found[length + 1] = buffer.clone(), state.clone()
    return found


def attend(query, buffer, state, layout, device, **options):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = attend_triton.attend(query.to(device), buffer.to(device), state.to(device), layout, **options)
    assert out.dtype == query.dtype and out.device.type == device.type
    return out.cpu()


def check(layout, device, lengths=tuple(LENGTHS), *, group=2, pads=None, tolerance=None, **options):
    options = {"scale": layout.key_dim**-0.5 * 1.3, **options}
    held, dtype = filled(layout, pads=pads), layout.dtype
    for length in lengths:
        query = randn(layout.batch, group * layout.kv_heads, 1, layout.key_dim, seed=length).to(dtype)
        expected = reference.attend(query.float(), *held[length], layout, **options)
        out = attend(query, *held[length], layout, device, **options)
        assert error(out, expected) < (tolerance or TOLERANCE[dtype]), length


@pytest.mark.parametrize("dtype", cases(TOLERANCE, [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("head_dim", cases([64, 80, 128], [80]))
def test_head_dims(head_dim, dtype, device):
    check(layout_of(head_dim=head_dim, dtype=dtype), device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes minutes in the interpreter")
def test_the_widest_heads(device):
    check(layout_of(head_dim=256, kv_heads=1, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("group", cases([1, 3, 4], [3]))
def test_groups(group, device):
    check(layout_of(batch=2, head_dim=32), device, group=group)


@pytest.mark.parametrize("interleaved", cases([False, True], [True]))
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of frames that are not there yet, and not read
@pytest.mark.parametrize("codec", cases(["spectrum", "spectrum2", "absmax", "rotated"], ["spectrum2", "absmax"]))
def test_codecs(codec, interleaved, device):
    check(layout_of(codec=codec, head_dim=32, value_dim=48, interleaved=interleaved), device)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(
    ("codec", "rooms", "sizes"),
    cases(
        [
            ["spectrum", (Room(8, 80), Room(4, 400)), [12, 52]],
            ["spectrum", (Room(4, 480),), [BLOCK]],
            ["spectrum2", (Room(16, 8), Room(8, 40), Room(4, 160), Room(3, 160), Room(2, 160)), [1, 5, 18, 20, 20]],
            ["spectrum2", (Room(3, 480),), [BLOCK]],
            ["spectrum2", (Room(2, 240), Room(1, 240)), [30, 34]],
        ],
        [["spectrum", (Room(4, 480),), [BLOCK]], ["spectrum2", (Room(2, 240), Room(1, 240)), [30, 34]]],
    ),
    ids=str,
)
def test_other_rooms(codec, rooms, sizes, device):
    """Tables by which every token of a block has a place."""
    layout = layout_of(rooms, head_dim=32, codec=codec)
    buffer, state = torch.full((layout.size,), 0xFF, dtype=torch.uint8), torch.zeros(STATE, dtype=torch.int32)
    views = layout.views(buffer)
    views.own.copy_(torch.tensor(sizes).expand_as(views.own))
    views.totals.copy_(torch.arange(layout.blocks + 1)[:, None] * torch.tensor(sizes))
    views.pads.zero_()
    for length in range(300):
        reference.append(buffer, state, *token(layout, length), layout)
        if length in (0, BLOCKS[0] - 1, 299):
            query = randn(1, 4, 1, 32, seed=length)
            expected = reference.attend(query, buffer, state, layout, scale=0.3)
            assert error(attend(query, buffer, state, layout, device, scale=0.3), expected) < 1e-3


@pytest.mark.parametrize(
    "options", cases([{"window": 40}, {"softcap": 3.0}, {"window": 300, "softcap": 2.0}], [{"window": 40}]), ids=str
)
def test_window_and_softcap(options, device):
    check(layout_of(batch=2, head_dim=32), device, FEW, **options)


def test_sinks(device):
    check(layout_of(batch=2, head_dim=32), device, LENGTHS[:1] + FEW, group=3, sinks=randn(6, seed=11) * 3)


@pytest.mark.parametrize("dtype", cases([torch.bool, torch.float32, torch.bfloat16], [torch.bool]), ids=str)
@pytest.mark.parametrize("shape", cases([(1, 1), (2, 1), (2, 4), (1, 4)], [(2, 1)]), ids=str)
def test_masks(shape, dtype, device):
    """With a column for all that there will be."""
    seen = torch.rand(*shape, 1, CAPACITY, generator=torch.Generator().manual_seed(12)) < 0.7
    seen[..., 0] = True
    mask = seen
    if dtype != torch.bool:
        mask = randn(*shape, 1, CAPACITY, seed=13).to(dtype).masked_fill(~seen, torch.finfo(dtype).min)
    check(layout_of(batch=2, head_dim=32), device, FEW, mask=mask)
    wide = torch.nn.functional.pad(mask.float(), (2, 3)).to(dtype)[..., 2:-3]
    check(layout_of(batch=2, head_dim=32), device, LENGTHS[-2:-1], mask=wide)


@pytest.mark.parametrize("length", cases(LENGTHS, LENGTHS[3:4]))
def test_a_mask_with_a_column_for_each_token(length, device):
    seen = torch.rand(2, 1, 1, length, generator=torch.Generator().manual_seed(12)) < 0.7
    seen[..., 0] = True
    check(layout_of(batch=2, head_dim=32), device, [length], mask=seen)


def test_padding(device):
    """Rows with padding at their start, which stands in the arenas and is hidden by the mask."""
    pads = (0, 23)
    mask = torch.arange(CAPACITY) >= torch.tensor(pads)[:, None]
    layout = layout_of(batch=2, head_dim=32, padded=True)
    check(layout, device, LENGTHS[1:], pads=pads, mask=mask[:, None, None])


def plain(query, keys, values, scale):
    """Softmax attention in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (keys, values))
    return torch.softmax(query.double() @ keys.mT * scale, -1) @ values


@pytest.mark.parametrize("dtype", cases([torch.float32, torch.float16], [torch.float32]), ids=str)
@pytest.mark.parametrize("ring", [300, 77], ids=["exact", "window"])
def test_without_tiers(ring, dtype, device):
    """All tokens, or those of a window, which alone are in the buffer then; that is not 0 elsewhere but NaN."""
    layout = layout_of((), ring=ring, capacity=300, batch=2, head_dim=32, dtype=dtype)
    buffer, state = empty(layout)
    whole = [torch.cat(side, 2) for side in zip(*(token(layout, at) for at in range(300)), strict=True)]
    for length in range(1, 301):
        reference.append(buffer, state, *token(layout, length - 1), layout)
        if length not in (1, 77, 78, 155, 300):
            continue
        query = randn(2, 6, 1, 32, seed=length).to(dtype)
        keys, values = (side[:, :, max(0, length - ring) : length] for side in whole)
        expected = plain(query, keys, values, 0.2)
        for window in (None, ring) if ring < 300 else (None,):
            out = attend(query, buffer, state, layout, device, scale=0.2, window=window)
            assert error(out, expected) < TOLERANCE[dtype]
        expected = plain(query, keys[:, :, -50:], values[:, :, -50:], 0.2)
        assert error(attend(query, buffer, state, layout, device, scale=0.2, window=50), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("length", cases(LENGTHS[2:], LENGTHS[3:4]))
def test_a_layer_of_which_the_host_tiered_the_first_blocks(length, device):
    """The same tokens in the same arenas; tables and the ring begin later."""
    layout = layout_of(head_dim=32)
    buffer, state = filled(layout)[length]
    query = randn(1, 4, 1, 32, seed=length)
    expected = attend(query, buffer, state, layout, device, scale=0.3)
    done = layout.done(length, 0)
    for first in {1, done}:
        moved, later = buffer.clone(), state.clone()
        views = layout.views(moved)
        views.totals.copy_(layout.views(buffer).totals.roll(-first, 0))
        for side in (views.keys, views.values):
            side.copy_(side.roll(-first * BLOCK, 2))
        later[BASE] = first * BLOCK
        assert torch.equal(attend(query, moved, later, layout, device, scale=0.3), expected)


@pytest.mark.parametrize("rooms", [ROOMS, ()], ids=["tiers", "exact"])
def test_not_a_number_once_a_token_was_refused(rooms, device):
    layout = layout_of(rooms, capacity=100, ring=RING if rooms else 100, head_dim=32)
    buffer, state = empty(layout)
    for length in range(100):
        reference.append(buffer, state, *token(layout, length), layout)
    query = randn(1, 4, 1, 32)
    assert not attend(query, buffer, state, layout, device, scale=0.3).isnan().any()
    reference.append(buffer, state, *token(layout, 100), layout)
    assert int(state[REFUSED]) == 1
    assert attend(query, buffer, state, layout, device, scale=0.3).isnan().all()


@pytest.mark.parametrize("side", cases(["keys", "values"], ["keys"]))
@pytest.mark.parametrize("length", cases(LENGTHS[:1] + LENGTHS[-1:], LENGTHS[:1]))
def test_a_token_that_is_not_a_number_is_not_hidden(length, side, device):
    """Its head gets NaN, as from any attention, and no other head is touched."""
    layout = layout_of(head_dim=32)
    buffer, state = (t.clone() for t in filled(layout)[length])
    query = randn(1, 4, 1, 32)
    sound = attend(query, buffer, state, layout, device, scale=0.2)
    getattr(layout.views(buffer), side)[0, 0, (length - 1) % RING] = torch.nan
    out = attend(query, buffer, state, layout, device, scale=0.2)
    assert out[:, :2].isnan().all()
    assert torch.equal(out[:, 2:], sound[:, 2:])


def test_a_query_that_sees_nothing_gets_zero(device):
    layout = layout_of(batch=2, head_dim=32)
    buffer, state = filled(layout)[CAPACITY]
    mask = torch.zeros(2, 1, 1, CAPACITY, dtype=torch.bool)
    mask[1] = True
    out = attend(randn(2, 4, 1, 32), buffer, state, layout, device, scale=0.2, mask=mask)
    assert not out[0].any() and out[1].all()


@pytest.mark.parametrize("bytes_of_a_share", cases([1, 1 << 30], [1 << 30]), ids=["most", "one"])
def test_shares(bytes_of_a_share, device, monkeypatch):
    """As many programs as can be, most without tokens, and one for each head."""
    from spectrumkv_kernels.attention import triton_attention

    monkeypatch.setattr(triton_attention, "SHARE_BYTES", bytes_of_a_share)
    for cached in (attend_triton._call, triton_attention.work_of):
        cached.cache_clear()
    check(layout_of(head_dim=32), device, LENGTHS[:1] + FEW)
    for cached in (attend_triton._call, triton_attention.work_of):
        cached.cache_clear()


@pytest.mark.parametrize("head_dim", [20, 512])
def test_other_head_dims(head_dim, device):
    layout = layout_of(
        (Room(8, 80), Room(4, 320)) if head_dim == 512 else (), head_dim=head_dim, ring=300, capacity=300
    )
    buffer, state = empty(layout) if not layout.rooms else (torch.zeros(layout.size, dtype=torch.uint8), None)
    state = torch.zeros(STATE, dtype=torch.int32)
    for length in range(5):
        reference.append(buffer, state, *token(layout, length), layout)
    query = randn(1, 4, 1, head_dim)
    expected = reference.attend(query, buffer, state, layout, scale=0.1)
    assert error(attend(query, buffer, state, layout, device, scale=0.1), expected) < 1e-3
    assert attend_triton.prepare(buffer.to(device), layout) == (head_dim == 20)


@pytest.mark.parametrize("rooms", [ROOMS, ()], ids=["tiers", "none"])
def test_what_can_be_captured(rooms, device):
    """The kernels wait for nothing; the reference reads counts on the host."""
    layout = layout_of(rooms, ring=RING if rooms else CAPACITY)
    buffer = torch.zeros(layout.size, dtype=torch.uint8, device=device)
    assert attend_triton.prepare(buffer, layout) and not reference.prepare(buffer, layout)


@pytest.mark.parametrize("name", ["mask", "sinks", "buffer", "state"])
def test_tensors_on_another_device(name, device):
    layout = layout_of(head_dim=32)
    buffer, state = filled(layout)[CAPACITY]
    given = {"buffer": buffer.to(device), "state": state.to(device), "mask": None, "sinks": None}
    elsewhere = {**given, "mask": torch.ones(1, 1, 1, CAPACITY), "sinks": torch.zeros(4)}
    given[name] = elsewhere[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must lie on {device}.*got meta"):
        attend_triton.attend(randn(1, 4, 1, 32).to(device), layout=layout, scale=0.1, **given)


@pytest.mark.gpu
def test_a_captured_graph_adds_and_attends(device, monkeypatch):
    """Over the boundary of a block, and round the ring; bit for bit as without a graph."""
    monkeypatch.delenv(VARIABLE)
    triton_append = pytest.importorskip("spectrumkv_kernels.static.triton_append")
    layout = layout_of(batch=2, head_dim=64, dtype=torch.bfloat16)
    first, steps = 60, 200
    tokens = [tuple(t.to(device) for t in token(layout, at)) for at in range(first + steps)]
    queries = [randn(2, 8, 1, 64, seed=at).bfloat16().to(device) for at in range(first + steps)]

    def start():
        buffer, state = (t.to(device) for t in empty(layout))
        for at in range(first):
            triton_append.append(buffer, state, *tokens[at], layout)
        return buffer, state

    def step(query, buffer, state, keys, values):
        triton_append.append(buffer, state, keys, values, layout)
        return attend_triton.attend(query, buffer, state, layout, scale=0.15)

    buffer, state = start()
    expected = [step(queries[at], buffer, state, *tokens[at]) for at in range(first, first + steps)]
    whole = layout.views(buffer)

    buffer, state = start()
    inputs = [t.clone() for t in (queries[0], *tokens[0])]
    graph, spare = torch.cuda.CUDAGraph(), start()
    side = torch.cuda.Stream()  # compile and launch once on other tensors, as a capture wants it
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs[0], *spare, *inputs[1:])
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = step(inputs[0], buffer, state, *inputs[1:])
    assert int(state[LENGTH]) == first
    for at in range(first, first + steps):
        for given, new in zip(inputs, (queries[at], *tokens[at]), strict=True):
            given.copy_(new)
        graph.replay()
        assert torch.equal(out, expected[at - first]), at
    assert int(state[LENGTH]) == first + steps and int(state[REFUSED]) == 0
    held = layout.views(buffer)
    assert torch.equal(held.keys, whole.keys) and torch.equal(held.values, whole.values)
    on_host = buffer.cpu(), state.cpu()
    wanted = reference.attend(queries[-1].float().cpu(), *on_host, layout, scale=0.15)
    assert error(out.cpu(), wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_counts_compile_nothing_anew(device):
    from spectrumkv_kernels.attention import triton_attention

    kernels = (triton_attention.prepare_kernel, triton_attention.attend_kernel, triton_attention.merge_kernel)
    layout = layout_of(dtype=torch.bfloat16)
    query, counts = randn(1, 4, 1, 64).bfloat16(), None
    for held in filled(layout).values():
        attend(query, *held, layout, device, scale=0.1)
        found = [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]
        counts = counts or found
        assert found == counts
