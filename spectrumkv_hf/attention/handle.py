"""What a compressed layer hands to attention in place of keys and values."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map


class Readable(Protocol):
    """A layer that attention can read without its keys and values; `SpectrumLayer` has the meaning of each."""

    layer_idx: int
    kv_heads: int
    generation: int
    device: torch.device

    @property
    def new_tokens(self) -> int: ...

    def check(self, generation: int) -> None: ...

    def dense_for(self, generation: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    def attend(
        self,
        generation: int,
        on_dense: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
        query: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        fused: bool = True,
    ) -> torch.Tensor: ...

    def check_complete(self) -> None: ...

    def note_route(self, direct: bool) -> None: ...


class Static(Protocol):
    """A layer that a decode step changes and reads without the host; `SpectrumLayer` has the meaning of each."""

    dtype: torch.dtype
    device: torch.device

    def attend_step(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor: ...

    def handles(self) -> "tuple[SpectrumHandle, SpectrumHandle]": ...


class StaticHandle:
    """Keys or values of a layer of fixed capacity after a decode step, on their way to its attention.

    No tensor: a compiler can't follow a subclass of it, and the layer's first attention has shown that models hand
    this on as it is.
    """

    def __init__(self, layer: Static, side: int) -> None:
        self.layer, self.side = layer, side

    def to(self, *args: torch.dtype | torch.device) -> "StaticHandle":
        """Itself, where it is that already."""
        for arg in args:
            if arg not in (self.layer.dtype, self.layer.device):
                raise TypeError(f"keys and values in tiers can't be moved or cast on their way to attention, to {arg}")
        return self


_PROPERTIES = ("shape", "dtype", "device", "requires_grad", "is_cuda", "ndim", "layout")
_METHODS = ("size", "dim", "numel", "ndimension", "element_size", "is_floating_point", "is_complex", "__len__")
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES} | {
    getattr(torch.Tensor, name) for name in _METHODS
}


class SpectrumHandle(torch.Tensor):
    """Keys or values of a `SpectrumLayer`: a tensor's shape, dtype and device, whose data is the layer's store.

    `scaled_dot_product_attention` on a pair of handles reads the store directly, also through the chain of views by
    which Transformers repeats the heads of a group. Any other operation gets the dequantised tensor, so a model with
    an attention of its own is right, at the price of that temporary. Valid until the layer next changes.
    """

    layer: Readable
    side: str
    generation: int
    repeats: int
    stage: str

    @staticmethod
    def __new__(
        cls,
        layer: Readable,
        side: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        repeats: int = 1,
        stage: str = "heads",
    ) -> "SpectrumHandle":
        handle = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=layer.device)
        handle.layer, handle.side, handle.repeats, handle.stage = layer, side, repeats, stage
        handle.generation = layer.generation
        return handle

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def dense(self) -> torch.Tensor:
        """The dequantised tensor, of the handle's shape.

        Raises:
            RuntimeError: the layer has changed since, or dropped tokens that plain attention would see.
        """
        self.layer.check(self.generation)
        self.layer.check_complete()
        keys, values = self.layer.dense_for(self.generation)
        tensor = keys if self.side == "keys" else values
        if self.stage == "heads" and self.repeats == 1:
            return tensor
        batch, heads, length, dim = tensor.shape
        tensor = tensor[:, :, None].expand(batch, heads, self.repeats, length, dim)
        return tensor if self.stage == "groups" else tensor.reshape(batch, heads * self.repeats, length, dim)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SpectrumHandle({self.side} of layer {self.layer.layer_idx}, shape={tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handle = args[0] if args and isinstance(args[0], SpectrumHandle) else None
        if handle is not None and (view := handle._repeated(func, args[1:], kwargs)) is not None:
            return view
        if func is scaled_dot_product_attention:
            return _sdpa(*args, **kwargs)
        return func(*tree_map(_densified, args), **tree_map(_densified, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached by operators called from C++, which bypass __torch_function__.
        return func(*tree_map(_densified, args), **tree_map(_densified, kwargs or {}))

    def _repeated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "SpectrumHandle | None":
        """The next handle along `x[:, :, None, :, :].expand(b, h, r, s, d).reshape(b, h * r, s, d)`, if it is that."""
        if kwargs:
            return None
        name, shape = getattr(func, "__name__", ""), tuple(self.shape)
        sizes = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list | torch.Size) else args
        full = slice(None)
        if name == "to" and all(arg in (self.dtype, self.device) for arg in args):
            return self
        if name == "__getitem__" and self.stage == "heads" and self.repeats == 1:
            if sizes == (full, full, None, full, full):
                return self._view((*shape[:2], 1, *shape[2:]), 1, "groups")
        elif self.stage == "groups" and name == "expand" and len(sizes) == 5 and self.repeats == 1:
            if (*sizes[:2], *sizes[3:]) == (*shape[:2], *shape[3:]):
                return self._view(sizes, sizes[2], "groups")
        elif self.stage == "groups" and name == "reshape" and sizes == (shape[0], shape[1] * shape[2], *shape[3:]):
            return self._view(sizes, self.repeats, "heads")
        return None

    def _view(self, shape: tuple[int, ...], repeats: int, stage: str) -> "SpectrumHandle":
        return SpectrumHandle(self.layer, self.side, shape, self.dtype, repeats, stage)


def _densified(value: Any) -> Any:
    return value.dense() if isinstance(value, SpectrumHandle) else value


@torch.compiler.disable
def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    def stock(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return scaled_dot_product_attention(
            query, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=k.shape[1] != query.shape[1]
        )

    if not (isinstance(key, SpectrumHandle) and isinstance(value, SpectrumHandle) and key.layer is value.layer):
        key, value = _densified(key), _densified(value)
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    layer = key.layer
    queries, heads = layer.new_tokens, query.shape[1]
    packed = queries == 1 and query.shape[2] > 1 and heads == layer.kv_heads  # Transformers' pack_gqa of one query
    if packed:
        query = query.flatten(1, 2).unsqueeze(2)
        if attn_mask is not None and attn_mask.shape[1] != 1:
            attn_mask = attn_mask.flatten(1, 2).unsqueeze(2)
    if attn_mask is not None and attn_mask.dim() != 4 or query.shape[2] != queries or dropout_p:
        return stock(_densified(key), _densified(value), attn_mask)
    if attn_mask is None and not is_causal and queries > 1:
        attn_mask = query.new_ones(1, 1, queries, key.shape[2], dtype=torch.bool)
    out = layer.attend(key.generation, stock, query, attn_mask, scale=scale or query.shape[-1] ** -0.5)
    return out.reshape(out.shape[0], heads, -1, out.shape[-1]) if packed else out
