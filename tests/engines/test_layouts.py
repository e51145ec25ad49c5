"""Layouts of engines, on small tensors written down by hand."""

import pytest
import torch

from spectrumkv_hf.engines.layouts import PER_TOKEN, VLLM_CPU, ChunkLayout, merge_blocks, split_blocks

# Two blocks of two tokens, one KV head, head_dim 2. Token t: key (10t + 1, 10t + 2), value the negative.
KEYS = torch.tensor([[[1.0, 2], [11, 12], [21, 22], [31, 32]]])
VALUES = -KEYS
ON_GPU = [[1.0, 2, -1, -2], [11, 12, -11, -12], [21, 22, -21, -22], [31, 32, -31, -32]]
# vLLM's `vec` kernels: the memory of a block is the keys as [head_dim, tokens], then the values as [tokens, head_dim].
ON_CPU = [[1.0, 11, 2, 12], [-1, -2, -11, -12], [21, 31, 22, 32], [-21, -22, -31, -32]]
RECORDED = {
    PER_TOKEN: torch.tensor(ON_GPU).view(2, 1, 2, 4),
    VLLM_CPU: torch.tensor(ON_CPU).view(2, 1, 2, 4),
}


@pytest.mark.parametrize("layout", RECORDED)
def test_recorded_blocks(layout):
    keys, values = split_blocks(RECORDED[layout], layout)
    assert torch.equal(keys, KEYS)
    assert torch.equal(values, VALUES)
    assert torch.equal(merge_blocks(KEYS, VALUES, 2, layout), RECORDED[layout])


@pytest.mark.parametrize("layout", RECORDED)
@pytest.mark.parametrize("shape", [(3, 2, 4, 12), (2, 3, 1, 8, 4)], ids=str)
def test_round_trip(layout, shape):
    """Several heads and leading dimensions; views of a larger cache, too."""
    blocks = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    keys, values = split_blocks(blocks, layout)
    assert keys.shape == (*shape[:-4], shape[-3], shape[-4] * shape[-2], shape[-1] // 2)
    assert torch.equal(merge_blocks(keys, values, shape[-2], layout), blocks)


def test_vllm_cpu_is_what_its_kernels_read():
    """The backend's own view of a block, `[kv_heads, 2 * tokens, head_dim]`, filled as its kernels fill it."""
    blocks, heads, size, dim = 3, 2, 4, 6
    keys, values = torch.randn(2, heads, blocks * size, dim)
    cache = torch.empty(blocks, heads, 2 * size, dim)
    for block in range(blocks):
        for head in range(heads):
            part = slice(block * size, (block + 1) * size)
            cache[block, head, :size] = keys[head, part].T.reshape(size, dim)
            cache[block, head, size:] = values[head, part]
    split = split_blocks(cache.view(blocks, heads, size, 2 * dim), VLLM_CPU)
    assert torch.equal(split[0], keys)
    assert torch.equal(split[1], values)


def test_refusals():
    with pytest.raises(ValueError, match="layout is one of per_token, vllm_cpu, got 'gpu'"):
        split_blocks(torch.zeros(1, 1, 2, 4), "gpu")
    with pytest.raises(ValueError, match="4 tokens are no whole number of blocks of 3"):
        merge_blocks(KEYS, VALUES, 3, PER_TOKEN)
    with pytest.raises(ValueError, match="'vllm_cpu' needs block, a positive integer, got 0"):
        ChunkLayout(2, 4, VLLM_CPU)
    with pytest.raises(ValueError, match="needs kv_heads, a positive integer, got 0"):
        ChunkLayout(0, 4, PER_TOKEN)


class TestChunk:
    @pytest.mark.parametrize(
        ("layout", "shape"),
        [
            (ChunkLayout(3, 4, PER_TOKEN), (2, 5, 8, 12)),
            (ChunkLayout(3, 4, PER_TOKEN), (5, 8, 24)),
            (ChunkLayout(3, 4, VLLM_CPU, block=2), (5, 8, 24)),
        ],
        ids=["planes", "side by side", "vllm_cpu"],
    )
    def test_round_trip(self, layout, shape):
        chunk = torch.randn(shape)
        assert layout.holds(chunk.shape)
        keys, values = layout.split(chunk)
        assert keys.shape == values.shape == (5, 3, 8, 4)
        out = torch.empty(shape)
        layout.merge(keys, values, out)
        assert torch.equal(out, chunk)

    def test_planes(self):
        chunk = torch.randn(2, 5, 8, 12)
        keys, values = ChunkLayout(3, 4, PER_TOKEN).split(chunk)
        assert torch.equal(keys[1, 2, 7], chunk[0, 1, 7, 8:])
        assert torch.equal(values[4, 0, 3], chunk[1, 4, 3, :4])

    def test_side_by_side(self):
        """Key and value alternate by head: one scale over half of a row would mix them."""
        chunk = torch.randn(5, 8, 24)
        keys, values = ChunkLayout(3, 4, PER_TOKEN).split(chunk)
        assert torch.equal(keys[1, 2, 7], chunk[1, 7, 16:20])
        assert torch.equal(values[1, 2, 7], chunk[1, 7, 20:])

    def test_vllm_cpu(self):
        """LMCache copies rows of vLLM's view, token by token, whatever is in them."""
        cache = torch.randn(4, 3, 2, 8)  # blocks, heads, tokens, 2 * head_dim
        chunk = cache.transpose(1, 2).reshape(1, 8, 24)
        keys, values = ChunkLayout(3, 4, VLLM_CPU, block=2).split(chunk)
        expected = split_blocks(cache, VLLM_CPU)
        assert torch.equal(keys[0], expected[0])
        assert torch.equal(values[0], expected[1])

    @pytest.mark.parametrize(
        ("layout", "shape"),
        [
            (ChunkLayout(3, 4, PER_TOKEN), (1, 5, 8, 12)),  # MLA
            (ChunkLayout(3, 4, PER_TOKEN), (2, 5, 8, 24)),
            (ChunkLayout(3, 4, PER_TOKEN), (5, 8, 12)),
            (ChunkLayout(3, 4, PER_TOKEN), (2, 5, 0, 12)),
            (ChunkLayout(3, 4, PER_TOKEN), (8, 24)),
            (ChunkLayout(3, 4, VLLM_CPU, block=2), (2, 5, 8, 12)),
            (ChunkLayout(3, 4, VLLM_CPU, block=3), (5, 8, 24)),
        ],
        ids=str,
    )
    def test_other_shapes(self, layout, shape):
        assert not layout.holds(torch.Size(shape))
