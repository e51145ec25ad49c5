"""The Triton twin of adding a token: natively where there is a GPU, else in Triton's interpreter."""

import pytest
import torch
from reference import assert_one_byte_scales
from test_static import LAYERS, Layer, assert_frames, check, codes_of, every_layer, flawed, refused

from spectrumkv_kernels import Quantized, Rotary, saturated
from spectrumkv_kernels.static import reference
from spectrumkv_kernels.static.layout import BASE, LENGTH, REFUSED

append_triton = pytest.importorskip("spectrumkv_kernels.static.triton_append")


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_twin(monkeypatch):
    """What goes to the reference shows."""
    monkeypatch.setattr(append_triton.twin, "append", lambda *a: pytest.fail("went to the twin"))


class Reference:
    append = staticmethod(reference.append)


class Some:
    """In the interpreter, which is slow, only those tokens with which a block is due, and every ninth."""

    @staticmethod
    def append(buffer, state, keys, values, layout):
        length, base = int(state[LENGTH]), int(state[BASE])
        plain = layout.due(length, base) == layout.done(length, base) and length % 9
        (Reference if plain and buffer.is_cpu else append_triton).append(buffer, state, keys, values, layout)


def bytes_of(layer):
    """The buffer's tensors by name, as bytes."""
    places = layer.layout.places
    buffer = layer.buffer.cpu()
    return {place[0]: buffer[place[3] : after[3]] for place, after in zip(places, places[1:], strict=False)}


@every_layer
def test_what_lies_where(name, device):
    """The same bytes but where codes rest on sums in another order."""
    options, count = LAYERS[name]
    layer = Layer(device, **options).append(Some, count)
    check(layer)
    twin = Layer(**options).append(Reference, count)
    ours, theirs = bytes_of(layer), bytes_of(twin)
    for part in ours:
        if not part.endswith((".codes", ".affine", "frame")):
            assert torch.equal(ours[part], theirs[part]), part
    if layer.layout.codec.center and layer.layout.done(layer.length, layer.base):
        assert_frames(layer.views.frame.cpu(), twin.views.frame, layer.layout, 1e-6)


def test_many_blocks_in_a_row(device):
    layer = Layer(device, capacity=300, pads=(0, 20), batch=2, kv_heads=1)
    for _ in range(3):
        check(layer.append(append_triton, 100))


@pytest.mark.parametrize("head_dim", [16, 128, 192, 256, 512])
def test_head_dims(head_dim, device):
    options = {"key_dim": head_dim, "value_dim": head_dim, "dtype": torch.bfloat16}
    check(Layer(device, batch=1, pads=(3,), length=72, **options).append(Some, 6))


@pytest.mark.parametrize("options", [{}, {"sizes": {}}, {"sizes": {}, "ring": 7}], ids=["tiers", "exact", "window"])
def test_a_full_layer_takes_no_more(options, device):
    refused(append_triton, device, **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
def test_flawed_tokens(codec, device):
    ours, theirs = flawed(device, codec).append(Some, 76), flawed("cpu", codec).append(Reference, 76)
    views, expected = ours.layout.views(ours.buffer.cpu()), theirs.views
    assert_frames(views.frame, expected.frame, ours.layout, 1e-6)
    for arena, other in zip(views.arenas, expected.arenas, strict=True):
        assert torch.equal(arena.positions, other.positions)
        if arena.bits == 16:
            assert torch.equal(arena.keys.view(torch.int16), other.keys.view(torch.int16))
            assert torch.equal(arena.values.view(torch.int16), other.values.view(torch.int16))
            continue
        for stored, twin in ((arena.keys, other.keys), (arena.values, other.values)):
            part = slice(0, ours.sizes[[room.bits for room in ours.layout.rooms].index(arena.bits)])
            mine, other = (Quantized(*(t[:, :, part] for t in side)) for side in (stored, twin))
            assert torch.equal(saturated(mine), saturated(other))
            sound = ~saturated(other)
            mine, other = (Quantized(*(t[sound] for t in side)) for side in (mine, other))
            if codec == "spectrum2":
                assert_one_byte_scales(mine, other, arena.bits)
            else:
                torch.testing.assert_close(mine.affine, other.affine, rtol=2.0**-9, atol=2.0**-20)
            same = (mine.affine == other.affine).all(-1)
            assert (codes_of(mine, arena.bits) - codes_of(other, arena.bits))[same].abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_of_another_dtype_or_strides(dtype, device):
    """As the reference's assignment takes them: keys of a fused projection, for instance."""
    ours, theirs = (Layer(where, dtype=torch.bfloat16, sizes={}) for where in (device, "cpu"))
    wide = torch.randn(2, 1, 6, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layer, append in ((ours, append_triton.append), (theirs, Reference.append)):
        fused = wide.to(layer.buffer.device).transpose(1, 2)
        append(layer.buffer, layer.state, fused[:, 1:3, :, ::2], fused[:, 3:5, :, 7:39], layer.layout)
    views, expected = ours.layout.views(ours.buffer.cpu()), theirs.views
    for stored, twin in ((views.keys, expected.keys), (views.values, expected.values)):
        # The interpreter cuts bits off where a GPU rounds.
        torch.testing.assert_close(stored, twin, rtol=2.0**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float64}, {"sizes": {4: 64}, "key_dim": 7, "value_dim": 7, "codec": "absmax"}, {"ring": 75}],
    ids=["float64", "odd", "a tight ring"],
)
def test_others_go_to_the_twin(options, device, monkeypatch):
    seen = []
    monkeypatch.setattr(append_triton.twin, "append", lambda *a: seen.append(a))
    Layer(device, **options).append(append_triton)
    assert len(seen) == 1


def test_positions_are_not_read_by_the_host(device, monkeypatch):
    layer = Layer(device, length=74)
    monkeypatch.setattr(Rotary, "table", lambda *a: pytest.fail("a table whose length depends on positions"))
    monkeypatch.setattr(torch.Tensor, "item", lambda *a: pytest.fail("waited for the device"))
    layer.append(append_triton, 2)
    monkeypatch.undo()
    check(layer)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 32])
def test_a_captured_graph(heads, device):
    """Replays tier blocks that become due, and count what a full layer refuses."""
    layer = Layer(device, capacity=300, batch=2, kv_heads=heads, key_dim=128, value_dim=128, dtype=torch.bfloat16)
    keys, values = (t[:, :, :1].to(device) for t in (layer.keys, layer.values))
    before = layer.buffer.clone(), layer.state.clone()
    append_triton.append(layer.buffer, layer.state, keys, values, layer.layout)
    layer.buffer.copy_(before[0])
    layer.state.copy_(before[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_triton.append(layer.buffer, layer.state, keys, values, layer.layout)
    for length in range(300):
        keys.copy_(layer.keys[:, :, length : length + 1])
        values.copy_(layer.values[:, :, length : length + 1])
        graph.replay()
        layer.length += 1
        if length % 50 == 49:
            check(layer)
    for _ in range(2):
        graph.replay()
    assert int(layer.state[REFUSED]) == 2 and int(layer.state[LENGTH]) == 300


@pytest.mark.gpu
def test_lengths_compile_nothing_anew(device):
    def compiled():
        return [len(cache[0]) for cache in append_triton.append_kernel.device_caches.values()]

    options = {"codec": "rotated", "key_dim": 64, "value_dim": 64}
    Layer(device, **options).append(append_triton, 2)
    before = compiled()
    for capacity, recent, held, pads in ((300, 16, 1, (0, 0)), (1024, 32, 64, (1, 16)), (77, 1, 13, (0, 0))):
        Layer(device, capacity=capacity, recent=recent, held=held, pads=pads, **options).append(append_triton, 70)
    assert compiled() == before
