import pytest
import torch
from reference import error, sylvester

from spectrumkv_kernels.rotation.hadamard import hadamard, hadamard_matrix

HEAD_DIMS = (1, 2, 64, 80, 96, 128, 256)
CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_sylvester_matrix(head_dim):
    x = torch.randn(2, 3, 7, head_dim, generator=torch.Generator().manual_seed(head_dim))
    assert error(hadamard(x), x.double() @ sylvester(head_dim).T) < 1e-6


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matrix_equals_sylvester_matrix(head_dim):
    matrix = hadamard_matrix(head_dim, CPU)
    assert matrix.dtype == torch.float32
    assert error(matrix, sylvester(head_dim)) < 1e-7


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_orthonormal(head_dim):
    matrix = hadamard(torch.eye(head_dim, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_own_inverse(head_dim):
    x = torch.randn(11, head_dim, generator=torch.Generator().manual_seed(1))
    assert error(hadamard(hadamard(x)), x) < 1e-6


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_row_is_bit_equal_in_any_company(head_dim):
    x = torch.randn(3, 67, head_dim, generator=torch.Generator().manual_seed(2))
    together = hadamard(x)
    strided = hadamard(x.transpose(0, 1)).transpose(0, 1)
    assert torch.equal(strided, together)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 12), slice(66, 67)):
        assert torch.equal(hadamard(x[1, rows]), together[1, rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_new_tensor_of_same_shape_and_dtype(dtype):
    for head_dim in (1, 96):
        x = torch.ones(2, 0, 3, head_dim, dtype=dtype)
        assert (hadamard(x).shape, hadamard(x).dtype) == (x.shape, dtype)
        x = torch.ones(3, head_dim, dtype=dtype)
        hadamard(x).zero_()
        assert bool((x == 1).all())
