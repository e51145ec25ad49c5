import pytest
import torch
from reference import error
from test_scores import SCALE, Inputs, additive, causal, expected_scores, randn

from spectrumkv_kernels.scores import reference as scores

pytest.importorskip("triton")

from spectrumkv_kernels.scores import triton_scores as scores_triton

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

KINDS = [torch.bool, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(queries, tokens=None, *, batch=1, heads=4, kv_heads=2, head_dim=16, dtype=torch.float16):
    query = (8 / head_dim) ** 0.5 * randn(batch, heads, queries, head_dim)
    return Inputs(query.to(dtype), (1.5 * randn(batch, kv_heads, tokens or queries, head_dim, seed=1)).to(dtype))


def masked(mask, kind):
    return mask if kind is torch.bool else additive(mask, kind)


def run(given, device, **options):
    """The kernels' scores, on the CPU, of arguments that are moved to `device` with the strides they have."""

    def moved(value):
        if not isinstance(value, torch.Tensor) or value.device == device:
            return value
        storage = torch.tensor([], dtype=value.dtype).set_(value.untyped_storage()).to(device)
        return storage.as_strided(value.shape, value.stride(), value.storage_offset())

    options = {name: moved(value) for name, value in options.items()}
    out = scores_triton.attention_scores(*(moved(t) for t in given), scale=SCALE, **options)
    assert out.device.type == device.type and out.dtype == torch.float32
    return out.cpu()


def check(given, device, *, exact=True, **options):
    """Against the twin, and where `exact` the reference in float64, which needs its `pads`."""
    pads = options.pop("pads", None)
    out = run(given, device, **options)
    twin = scores.attention_scores(*given, scale=SCALE, **options)
    assert error(out, twin) < 1e-5
    assert bool((out[twin == 0] == 0).all())
    if exact:
        assert error(out, expected_scores(*given, pads=pads, **options)) < 1e-5
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 2, 63, 129, 203])
def test_lengths(queries, dtype, device):
    check(inputs(queries, dtype=dtype), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype, device):
    check(inputs(37, head_dim=head_dim, dtype=dtype), device, recent=9, strided=5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (32, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_groups(batch, heads, kv_heads, device):
    check(inputs(33, 41, batch=batch, heads=heads, kv_heads=kv_heads), device, recent=9, strided=5)


@pytest.mark.parametrize(("recent", "strided"), [(1, 1), (5, 0), (0, 7), (30, 40), (150, 100)])
def test_number_of_probes(recent, strided, device):
    check(inputs(145, batch=2), device, recent=recent, strided=strided, exact=recent > 0)


def test_no_probes(device):
    assert bool((run(inputs(20), device, recent=0, strided=0) == 0).all())


@pytest.mark.parametrize("window", [None, 1, 700, 5000])
@pytest.mark.parametrize(("queries", "split"), [(20, 300), (20, 700), (2500, 300)])
def test_many_splits_of_the_keys(queries, split, window, device, monkeypatch, request):
    """More of them than the second pass joins itself, and as many."""
    monkeypatch.setattr(scores_triton, "SPLIT", split)
    scores_triton._passes.cache_clear()
    request.addfinalizer(scores_triton._passes.cache_clear)
    given = inputs(queries, 2500, batch=2)
    check(given, device, window=window, recent=12, strided=12, sinks=randn(4, seed=3), exact=False)


@pytest.mark.parametrize("window", [1, 2, 10, 29, 100])
@pytest.mark.parametrize("tokens", [30, 144])
def test_window(tokens, window, device):
    check(inputs(30, tokens, batch=2), device, window=window, recent=6, strided=3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("queries", [40, 150])
def test_masks_with_padding(queries, kind, device):
    mask = masked(causal(queries, 150, 3, pads=(0, 137, 113)), kind)
    given = inputs(queries, 150, batch=3)
    out = check(given, device, mask=mask, recent=9, strided=8, pads=(0, 137, 113))
    assert bool((out[1, :, :137] == 0).all()) and bool((out[1, :, 137:] > 0).all())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_mask_of_each_head(rows, kind, device):
    mask = torch.rand(rows, 4, 30, 30, generator=torch.Generator().manual_seed(2)) < 0.6
    mask = (mask | torch.eye(30, dtype=torch.bool)) & causal(30, 30)
    check(inputs(30, batch=2), device, mask=masked(mask, kind), recent=8, strided=8)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16], ids=str)
def test_strided_masks(kind, device):
    """Broadcast over heads, rows of the batch, queries or keys; a slice, and one whose keys are not contiguous."""
    given, options = inputs(30, 41, batch=2), {"recent": 8, "strided": 8, "exact": False}
    mask = masked(causal(30, 41, 2, pads=(0, 20)), kind)
    expected = check(given, device, mask=mask, **options)
    wide = torch.nn.functional.pad(mask.float(), (3, 6, 2, 2)).to(kind)
    for same in (mask.expand(-1, 4, -1, -1), wide[..., 2:-2, 3:-6], mask.mT.contiguous().mT):
        assert error(run(given, device, mask=same, recent=8, strided=8), expected) < 1e-6
    keys_only = masked(torch.arange(41) >= torch.tensor([[[[0]]], [[[7]]]]), kind)
    check(given, device, mask=keys_only.expand(-1, -1, 30, -1), **options)
    check(given, device, mask=mask[:1].expand(2, 4, -1, -1), **options)
    check(given, device, mask=masked(torch.ones(1, 1, 30, 1, dtype=torch.bool), kind).expand(-1, -1, -1, 41), **options)


def test_finite_bias_is_added(device):
    bias = 2 * randn(1, 4, 30, 30, seed=3).masked_fill(~causal(30, 30), torch.finfo().min / 2)
    check(inputs(30, batch=2), device, mask=bias, recent=8, strided=8)


def test_hidden_entries_with_a_bias_stay_hidden(device):
    bias = 64 * torch.rand(1, 4, 30, 30, generator=torch.Generator().manual_seed(3)).half()
    check(inputs(30), device, mask=additive(causal(30, 30), torch.float16) + bias, recent=8, strided=8)
    check(inputs(30), device, mask=torch.zeros(1, 1, 30, 30).masked_fill(~causal(30, 30), -torch.inf), recent=8)


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32], ids=str)
def test_softcap_and_sinks(kind, device):
    given, sinks = inputs(30, batch=2), 2 * randn(4, seed=3)
    mask = None if kind is None else masked(causal(30, 30, 2, pads=(0, 6)), kind)
    options = {"mask": mask, "recent": 8, "strided": 8, "pads": None if kind is None else (0, 6)}
    plain = check(given, device, **options)
    for extra in ({"softcap": 1.5}, {"sinks": sinks}, {"softcap": 1.5, "sinks": sinks.bfloat16()}):
        assert error(check(given, device, **options, **extra), plain) > 0.01


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)], ids=["no_sinks", "sinks"])
def test_row_of_padding_only_gets_zero(sinks, kind, device):
    mask = masked(causal(12, 12, 2, pads=(0, 12)), kind)
    out = run(inputs(12, batch=2), device, mask=mask, sinks=sinks)
    assert bool((out[1] == 0).all())
    assert bool(out[0].isfinite().all()) and bool((out[0] > 0).all())


@pytest.mark.parametrize("masks", [False, True])
def test_keys_of_padding_may_be_anything(masks, device):
    query, keys = inputs(40, 52, batch=2)
    mask = causal(40, 52, 2, pads=(9, 9)) if masks else None
    window = None if masks else 4  # of the first query at 12
    expected = run((query, keys), device, mask=mask, window=window)
    keys[:, :, :9] = torch.nan if masks else torch.inf
    out = run((query, keys), device, mask=mask, window=window)
    assert torch.equal(out[..., 9:], expected[..., 9:]) and bool(out.isfinite().all())


def test_views(device):
    """As a model hands them over: of `[batch, tokens, heads, head_dim]`, or of a longer buffer."""
    query, keys = inputs(40, 52, batch=2)
    expected = check((query, keys), device, recent=9, strided=5)
    longer = torch.cat((keys, torch.full_like(keys, torch.nan)), dim=2)
    wider = torch.cat((torch.full_like(keys, torch.nan), keys), dim=3)
    swapped = query.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (
        keys.transpose(1, 2).contiguous().transpose(1, 2),
        longer[:, :, :52],
        wider[..., 16:],
        keys.mT.contiguous().mT,
    ):
        assert torch.equal(run((swapped, view), device, recent=9, strided=5), expected)


def test_runs_are_identical(device):
    tokens = 1300 if device.type == "cuda" else 300
    given, options = inputs(200, tokens, head_dim=64, dtype=torch.bfloat16), {"softcap": 5.0, "window": tokens // 2}
    first = run(given, device, **options)
    for _ in range(20 if device.type == "cuda" else 1):
        assert torch.equal(run(given, device, **options), first)


def test_what_the_kernels_do_not_take_goes_to_the_twin(device):
    query, keys = inputs(20)
    for given, mask in [
        ((query.double(), keys.double()), None),
        ((query.float(), keys), None),
        ((query, keys), additive(causal(20, 20), torch.float64)),
        (inputs(20, head_dim=260), None),
    ]:
        twin = scores.attention_scores(*given, scale=SCALE, mask=mask)
        assert error(run(given, device, mask=mask), twin) < 1e-5


def test_arguments_are_left_as_they_were(device):
    given = [*inputs(30, batch=2), additive(causal(30, 30, 2, pads=(0, 6))), randn(4)]
    given = [t.to(device) for t in given]
    before = [t.clone() for t in given]
    query, keys, mask, sinks = given
    scores_triton.attention_scores(query, keys, scale=SCALE, mask=mask, sinks=sinks, softcap=2.0)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
