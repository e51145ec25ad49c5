"""The digest's sums: all twins, bit for bit, against Python's integers."""

import pytest
import reference
import torch

from spectrumkv_kernels import digest_sums, write_sums
from spectrumkv_kernels.backend import build_cpp
from spectrumkv_kernels.backend.dispatch import VARIABLE
from spectrumkv_kernels.wire import checksum
from spectrumkv_kernels.wire import cpp_checksum as checksum_cpp

CPU = torch.device("cpu")
SIZES = [0, 1, 2, 7, 8, 9, 1023, 1024, 1025, 2048, 3 * 1024 + 8, 17 * 1024 + 511, 131 * 1024 + 1]

needs_compiler = pytest.mark.skipif(not build_cpp.compilers(), reason="no C++ compiler")


@pytest.fixture(params=["torch", pytest.param("cpp", marks=needs_compiler), "triton"])
def name(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def twin(name, monkeypatch):
    monkeypatch.setenv(VARIABLE, name)
    device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    function = digest_sums.on(device.type)
    return lambda words: function(words.to(device)).cpu()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def words(count, seed=0):
    data = torch.randint(0, 256, (8 * count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(torch.int64)


def expected(given):
    """The sums as the signed words of a tensor."""
    plain = [n & (2**64 - 1) for n in given.tolist()]
    return [n - 2**64 if n >> 63 else n for n in reference.digest_sums(plain)]


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
@pytest.mark.parametrize("count", SIZES)
def test_equals_its_description(twin, count):
    given = words(count, seed=count)
    sums = twin(given)
    assert sums.dtype == torch.int64
    assert sums.tolist() == expected(given)


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
def test_in_the_midst_of_other_memory(twin):
    """Words beside those that are asked for count for nothing, on no alignment but their own."""
    given = words(5003, seed=1)
    assert twin(given[3:4000]).tolist() == expected(given[3:4000])


def pieces():
    """Bytes from 0 to 200,000 in tensors of many sizes, not all of them contiguous, the odd sizes last."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(3, 1024, 8), (64, 125), (1,), (0, 5), (17, 1024), (4, 6, 2), (9, 9), (3,), (77, 5)]
    dtypes = [torch.int64, torch.float32, torch.int64, torch.float16, torch.uint8] + 4 * [torch.uint8]
    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        tensors.append(raw.view(dtype).view(shape))
    tensors[1] = tensors[1].t().contiguous().t()
    tensors[6] = tensors[6].t()
    return tensors


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
@pytest.mark.parametrize("start", [0, 64, 8192 - 8, 3 * 8192 + 128])
@pytest.mark.parametrize("first", [0, 4, 6])
def test_writing(monkeypatch, name, start, first):
    monkeypatch.setenv(VARIABLE, name)
    device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    tensors = pieces()[first:]
    flat = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])
    size = -(-(start + len(flat)) // 64) * 64
    around = torch.full((size + 128,), 7, dtype=torch.uint8, device=device)
    payload = around[64:-64]
    sums = write_sums.on(device.type)(payload, [t.to(device) for t in tensors], start)
    expected_bytes = torch.full_like(around.cpu(), 7)
    expected_bytes[64 + start :][: len(flat)] = flat
    assert torch.equal(around.cpu(), expected_bytes)
    assert torch.equal(sums.cpu(), checksum.digest_sums(expected_bytes[64:-64].view(torch.int64)))


@needs_compiler
@pytest.mark.parametrize("count", [33 * 1024, 200 * 1024 + 24])
def test_threads(threads, count):
    given = words(count, seed=2)
    for number in (1, 2, 3, 7):
        threads(number)
        assert torch.equal(checksum_cpp.digest_sums(given), checksum.digest_sums(given))


@needs_compiler
def test_threads_that_write(threads):
    tensors, size = pieces(), 64 + sum(t.nbytes for t in pieces())
    size = -(-size // 64) * 64
    expected_payload = torch.zeros(size, dtype=torch.uint8)
    expected_sums = checksum.write_sums(expected_payload, tensors, 64)
    for number in (1, 2, 3, 7):
        threads(number)
        payload = torch.zeros(size, dtype=torch.uint8)
        assert torch.equal(checksum_cpp.write_sums(payload, tensors, 64), expected_sums)
        assert torch.equal(payload, expected_payload)


@needs_compiler
def test_what_goes_to_the_twin(monkeypatch):
    monkeypatch.setattr(checksum_cpp, "library", lambda: pytest.fail("the library was asked for"))
    assert checksum_cpp.digest_sums(torch.empty(3000, dtype=torch.int64, device="meta")).shape == (3 + 1024,)
    payload, tensor = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (8 * 3000, 80))
    assert checksum_cpp.write_sums(payload, [tensor], 64).shape == (3 + 1024,)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [8, 1 << 17, (1 << 24) + 8])
def test_on_a_gpu(monkeypatch, count):
    monkeypatch.delenv(VARIABLE, raising=False)
    given = words(count, seed=3)
    assert torch.equal(digest_sums.on("cuda")(given.cuda()).cpu(), checksum.digest_sums(given))
