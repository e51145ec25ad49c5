"""How kernels are launched: by Triton's private launcher where that was tested, else by its public way."""

import functools
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton")

from spectrumkv_kernels.backend import launch_triton  # noqa: E402
from spectrumkv_kernels.backend.launch_triton import Held, Launcher, Series  # noqa: E402
from spectrumkv_kernels.wire import checksum  # noqa: E402
from spectrumkv_kernels.wire import triton_checksum as checksum_triton  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Kernel:
    """Stands in for a function of `triton.jit`: notes how it is called, `(way, tensors, numbers and constants)`."""

    fn = SimpleNamespace(__name__="kernel")
    arg_names = ["tensor", "held", "count", "scale", "KIND"]

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def call(tensor, held, *rest, **options):
            self.calls.append(("public", grid, (tensor.data_ptr(), tuple(t.data_ptr() for t in held)), rest, options))
            return SimpleNamespace(run=self.run, function="function", packed_metadata="metadata")

        return call

    def run(self, x, y, z, stream, function, metadata, *hooks, **options):
        nothing, (tensor, held, *rest) = hooks[:3], hooks[3:]
        assert (stream, function, metadata, nothing) == (7, "function", "metadata", (None, None, None))
        self.calls.append(("private", (x, y, z), (tensor, held), tuple(rest), options))


@pytest.fixture
def version(monkeypatch):
    """Sets the version of Triton that is seen."""
    fresh = functools.cache(launch_triton.direct.__wrapped__)
    monkeypatch.setattr(launch_triton, "direct", fresh)

    def set_version(text):
        monkeypatch.setattr(triton, "__version__", text)
        fresh.cache_clear()

    return set_version


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("3.6.0", ["public", "private", "private"]),
        ("3.6.0+gitabc", ["public", "private", "private"]),
        ("3.6.1", ["public"] * 3),
        ("3.4.0", ["public"] * 3),
        ("4.0.0", ["public"] * 3),
    ],
)
def test_the_private_launcher_only_where_it_was_tested(text, ways, version, monkeypatch):
    version(text)
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    monkeypatch.setattr(
        launch_triton, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    )
    kernel, a, b = Kernel(), torch.zeros(4), torch.ones(4)
    held = Held((b,), (b.data_ptr(),))
    launcher = Launcher(kernel, {"KIND": "constant"})
    for _ in range(3):
        launcher((2, 1, 1), {"tensor": a, "held": held}, {"count": 3, "scale": 0.5}, "known")
    assert [call[0] for call in kernel.calls] == ways
    arguments = ((2, 1, 1), (a.data_ptr(), (b.data_ptr(),)), (3, 0.5, "constant"), {})
    assert all(call[1:] == arguments for call in kernel.calls)


@pytest.mark.parametrize(("text", "made"), [(min(launch_triton.DIRECT), 1), ("99.0", 3)])
def test_tensors_are_made_where_addresses_do_not_do(text, made, version, monkeypatch):
    version(text)
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    monkeypatch.setattr(
        launch_triton, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    )
    kernel, a, b, calls = Kernel(), torch.zeros(4), torch.ones(4), []
    held = Held(lambda: calls.append(1) or (b,), (b.data_ptr(),))
    launcher = Launcher(kernel, {"KIND": "constant"})
    for _ in range(3):
        launcher((2, 1, 1), {"tensor": a, "held": held}, {"count": 3, "scale": 0.5}, "known")
    assert len(calls) == made
    assert all(call[2] == (a.data_ptr(), (b.data_ptr(),)) for call in kernel.calls)


def test_without_what_is_known_of_the_arguments_it_is_the_public_way(version, monkeypatch):
    """A kernel may specialise on numbers then."""
    version(min(launch_triton.DIRECT))
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    kernel, a = Kernel(), torch.zeros(4)
    launcher = Launcher(kernel, {"KIND": "constant"}, num_warps=2)
    for _ in range(3):
        launcher((2,), {"tensor": a, "held": (a,)}, {"count": 3, "scale": 0.5})
    assert [call[0] for call in kernel.calls] == ["public"] * 3
    assert all(call[4] == {"num_warps": 2} for call in kernel.calls)


@pytest.mark.parametrize("known", [None, "known"])
@pytest.mark.parametrize("text", [min(launch_triton.DIRECT), "99.0"])
@pytest.mark.parametrize(
    ("numbers", "constants"),
    [
        ({"scale": 0.5, "count": 3}, {"KIND": 1}),
        ({"count": 3}, {"KIND": 1}),
        ({"count": 3, "scale": 0.5, "other": 1}, {"KIND": 1}),
        ({"count": 3, "scale": 0.5}, {"SORT": 1}),
    ],
    ids=["order", "missing", "more", "name"],
)
def test_arguments_in_another_order_or_of_other_names_are_refused(
    numbers, constants, text, known, version, monkeypatch
):
    version(text)
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    kernel, a = Kernel(), torch.zeros(4)
    sentence = (
        f"^kernel takes tensor, held, count, scale, KIND; given were tensor, held, {', '.join(numbers | constants)}$"
    )
    with pytest.raises(TypeError, match=sentence):
        Launcher(kernel, constants)((2, 1, 1), {"tensor": a, "held": (a,)}, numbers, known)
    assert not kernel.calls


@pytest.mark.parametrize(
    ("text", "ways"), [(min(launch_triton.DIRECT), ["public", "private", "private"]), ("99.0", ["public"] * 3)]
)
def test_a_series_launches_each_kernel_with_its_own_arguments(text, ways, version, monkeypatch):
    version(text)
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    monkeypatch.setattr(
        launch_triton, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    )
    kernels, names = (Kernel(), Kernel()), ("tensor", "held")
    series = Series(
        [
            (Launcher(kernels[0], {"KIND": "a"}), (2, 1, 1), names, {"count": 3, "scale": 0.5}),
            (Launcher(kernels[1], {"KIND": "b"}, num_warps=2), (4, 2, 1), names, {"count": 5, "scale": 0.1}),
        ]
    )
    for _ in range(3):  # with other tensors each time
        a, b = torch.zeros(4), torch.ones(4)
        held = Held((b,), (b.data_ptr(),))
        series([(a, held), (b, Held((a,), (a.data_ptr(),)))], "known")
        first, second = kernels[0].calls[-1], kernels[1].calls[-1]
        assert first[1:4] == ((2, 1, 1), (a.data_ptr(), (b.data_ptr(),)), (3, 0.5, "a"))
        assert second[1:4] == ((4, 2, 1), (b.data_ptr(), (a.data_ptr(),)), (5, 0.1, "b"))
    assert [[call[0] for call in kernel.calls] for kernel in kernels] == [ways, ways]


@pytest.mark.parametrize("text", [min(launch_triton.DIRECT), "99.0"])
def test_numbers_that_come_with_each_call(text, version, monkeypatch):
    """They stand before those that stay, in both ways."""
    version(text)
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    monkeypatch.setattr(
        launch_triton, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    )
    kernels, a = (Kernel(), Kernel()), torch.zeros(4)
    held = Held((a,), (a.data_ptr(),))
    series = Series(
        [
            (Launcher(kernels[0], {"KIND": "a"}), (2, 1, 1), ("tensor", "held", "count"), {"scale": 0.5}),
            (Launcher(kernels[1], {"KIND": "b"}), (2, 1, 1), ("tensor", "held"), {"count": 5, "scale": 0.1}),
        ]
    )
    for count in (3, 4, 8):
        series([(a, held)] * 2, "known", [(count,), ()])
        assert kernels[0].calls[-1][3] == (count, 0.5, "a") and kernels[1].calls[-1][3] == (5, 0.1, "b")
    with pytest.raises(ValueError, match="zip"):
        series([(a, held)] * 2, "other", [(), ()])
    assert len(kernels[0].calls) == 3


def test_a_series_compiles_for_what_it_does_not_know_and_launches_on_the_current_stream(version, monkeypatch):
    version(min(launch_triton.DIRECT))
    stream = 7
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    monkeypatch.setattr(
        launch_triton, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: stream))
    )
    kernel, a = Kernel(), torch.zeros(4)
    numbers = {"count": 3, "scale": 0.5}
    series = Series([(Launcher(kernel, {"KIND": "a"}), (2, 1, 1), ("tensor", "held"), numbers)])
    given = [(a, Held((a,), (a.data_ptr(),)))]
    for known in ("one", "one", "other", "other"):
        series(given, known)
    assert [call[0] for call in kernel.calls] == ["public", "private"] * 2
    stream = 8
    with pytest.raises(AssertionError):  # `Kernel` wants 7
        series(given, "one")
        series(given, "one")


def test_what_is_tested_is_in_the_versions_named():
    assert launch_triton.DIRECT and all(str(Version(text)) == text for text in launch_triton.DIRECT)


@pytest.mark.parametrize("text", [*sorted(launch_triton.DIRECT), "99.0"])
def test_same_results(text, version):
    """On a GPU the private launcher, where the version there is tested, and the public one."""
    if DEVICE.type == "cuda" and text in launch_triton.DIRECT and triton.__version__ != text:
        pytest.skip(f"this is Triton {triton.__version__}: the private launcher of {text} is another")
    version(text)
    for size in (3000, 5000, 3000):
        words = torch.randint(-(2**62), 2**62, (size,), generator=torch.Generator().manual_seed(size))
        expected = checksum.digest_sums(words)
        for _ in range(2):
            assert torch.equal(checksum_triton.digest_sums(words.to(DEVICE)).cpu(), expected)
