"""Where engines keep a token's key and value: conversions to `[..., kv_heads, tokens, head_dim]` and back.

vLLM's view of a layer's cache is `[blocks, kv_heads, tokens in a block, 2 * head_dim]` everywhere. What lies in it
differs: FlashAttention on GPUs has the key in the first half of a row and the value in the second. The CPU backend's
`vec` kernels see the same memory as `[blocks, kv_heads, 2 * tokens, head_dim]` with the values in the second half and,
in the first, the keys of the block **transposed**, `[head_dim, tokens]`. A row of the view is then no token.
"""

from dataclasses import dataclass

import torch

PER_TOKEN = "per_token"
VLLM_CPU = "vllm_cpu"
LAYOUTS = (PER_TOKEN, VLLM_CPU)
"""How a block holds its tokens: a key and a value in each row, or as vLLM's `vec` kernels for CPUs read them."""

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, `[..., kv_heads, tokens, head_dim]` each."""


def check_layout(layout: str) -> None:
    """Refuse a name that is none of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")


def split_blocks(blocks: torch.Tensor, layout: str) -> KV:
    """Keys and values of whole blocks, in the order of the blocks.

    Args:
        blocks: `[..., blocks, kv_heads, tokens in a block, 2 * head_dim]`.
        layout: One of `LAYOUTS`.

    Returns:
        `[..., kv_heads, tokens, head_dim]` each.
    """
    check_layout(layout)
    size, dim = blocks.shape[-2], blocks.shape[-1] // 2
    if layout == VLLM_CPU:
        keys, values = blocks.contiguous().unflatten(-1, (2, dim)).flatten(-3, -2).chunk(2, dim=-2)
        keys = keys.flatten(-2).unflatten(-1, (dim, size)).transpose(-1, -2)
    else:
        keys, values = blocks.split(dim, dim=-1)
    return _tokens_of(keys), _tokens_of(values)


def merge_blocks(keys: torch.Tensor, values: torch.Tensor, size: int, layout: str) -> torch.Tensor:
    """The inverse of `split_blocks`: new blocks of `size` tokens.

    Raises:
        ValueError: the tokens are not whole blocks.
    """
    check_layout(layout)
    if size < 1 or keys.shape[-2] % size:
        raise ValueError(f"{keys.shape[-2]} tokens are no whole number of blocks of {size!r}")
    keys, values = (side.unflatten(-2, (-1, size)).transpose(-3, -4) for side in (keys, values))
    if layout == VLLM_CPU:
        transposed = keys.transpose(-1, -2).flatten(-2).unflatten(-1, (size, keys.shape[-1]))
        return torch.cat((transposed, values), dim=-2).flatten(-2).unflatten(-1, (size, 2 * keys.shape[-1]))
    return torch.cat((keys, values), dim=-1)


def _tokens_of(side: torch.Tensor) -> torch.Tensor:
    """`[..., blocks, kv_heads, tokens in a block, dim]` to `[..., kv_heads, tokens, dim]`."""
    return side.transpose(-3, -4).flatten(-3, -2)


@dataclass(frozen=True)
class ChunkLayout:
    """How a chunk's tensor in LMCache holds keys and values of some layers: of `[2, layers, tokens, hidden]` as its
    documentation has it, or of `[layers, tokens, 2 * hidden]` as it comes from vLLM, key and value side by side per
    head. `hidden` is `kv_heads * head_dim`.

    Attributes:
        kv_heads: KV heads in the tensor; with tensor parallelism, one worker's.
        head_dim: Channels of a key and of a value.
        layout: What the rows of the second kind are, one of `LAYOUTS`.
        block: Tokens in a block of the engine, for `vllm_cpu`.

    Raises:
        ValueError: a number that is not positive, an unknown layout, `vllm_cpu` without a block.
    """

    kv_heads: int
    head_dim: int
    layout: str
    block: int | None = None

    def __post_init__(self) -> None:
        check_layout(self.layout)
        given = {"kv_heads": self.kv_heads, "head_dim": self.head_dim}
        if self.layout == VLLM_CPU:
            given["block"] = self.block if self.block is not None else 0
        for name, value in given.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"layout {self.layout!r} needs {name}, a positive integer, got {value!r}")

    def holds(self, shape: torch.Size) -> bool:
        """Whether a tensor of this shape is keys and values as the class says."""
        hidden = self.kv_heads * self.head_dim
        if 0 in shape:
            return False
        if len(shape) == 4:
            # Never seen of vLLM's CPU backend, so that nobody knows what its rows would be.
            return shape[0] == 2 and shape[3] == hidden and self.layout == PER_TOKEN
        whole = self.block is None or (len(shape) == 3 and shape[1] % self.block == 0)
        return len(shape) == 3 and shape[2] == 2 * hidden and whole

    def split(self, tensor: torch.Tensor) -> KV:
        """Keys and values of a tensor that `holds`, `[layers, kv_heads, tokens, head_dim]` each."""
        if tensor.dim() == 4:
            keys, values = tensor.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(-2, -3)
            return keys, values
        rows = tensor.unflatten(-1, (self.kv_heads, -1))  # [layers, tokens, kv_heads, 2 * head_dim]
        blocks = rows.unflatten(1, (-1, self._size(rows.shape[1]))).transpose(-2, -3)
        return split_blocks(blocks, self.layout)

    def merge(self, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `split` gave into `out`."""
        if out.dim() == 4:
            out.copy_(torch.stack((keys, values)).transpose(-2, -3).flatten(-2))
            return
        blocks = merge_blocks(keys, values, self._size(out.shape[1]), self.layout)
        out.copy_(blocks.transpose(-2, -3).flatten(1, 2).flatten(-2))

    def _size(self, tokens: int) -> int:
        return self.block if self.block is not None else tokens
