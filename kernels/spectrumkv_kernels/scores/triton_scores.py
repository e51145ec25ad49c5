"""Attention mass that each key receives from a sample of the queries, in Triton."""

# mypy: allow-untyped-defs

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..attention.triton_dot import LOG2E
from ..backend.launch_triton import Launch, Launcher, Series, alignments, cdiv, next_power_of_2, on_device, strides_of
from ..segment import contiguous_rows
from . import reference as twin
from .reference import probe_rows, real_tokens

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

PROGRAMS = 1024
"""The first pass splits the keys until it has about so many programs: a few for each multiprocessor."""

SPLIT = 1024
"""The fewest keys of a split."""

JOINED = 256
"""Rows of probes whose normalisers a program joins."""

PARTS = 4
"""So many splits' normalisers the second pass joins itself; more are joined in a launch between."""

LN2 = tl.constexpr(0.6931471805599453)

LENGTHS = ["window", "tokens", "probes", "offset", "span", "mask_heads", "mask_batch", "mask_head", "mask_row"]
"""Arguments that vary with lengths: their values must not have a kernel compiled anew."""


@triton.jit
def _seen(at, n, tokens, window, hidden, mask, mask_column):
    """Whether a row, whose place among the keys is `at` (-1: none), sees key `n`, and what an additive mask adds.

    `at`, `n` and `mask`, pointers to the rows of the mask, broadcast to `[rows, keys]` or `[keys, rows]`.
    """
    bias = 0.0
    if mask is None:
        seen = n <= at
        if window is not None:
            seen = seen & (n > at - window)
    else:
        entries, readable = mask + n.to(tl.int64) * mask_column, (at >= 0) & (n < tokens)
        if mask.dtype.element_ty == tl.uint8:
            seen = tl.load(entries, mask=readable, other=0) != 0
        else:
            bias = tl.load(entries, mask=readable, other=float("-inf")).to(tl.float32)
            seen = bias > hidden
            bias *= LOG2E
    return seen, bias


@triton.jit
def _logits(product, scale, softcap, at, n, tokens, window, hidden, mask, mask_column):
    """Scores of products of queries and keys, as exponents of 2; -inf where a row does not see the key."""
    seen, bias = _seen(at, n, tokens, window, hidden, mask, mask_column)
    if softcap is not None:
        product, scale = 1 - 2 / (1 + tl.exp2(product * (scale / softcap * 2 * LOG2E))), softcap  # tanh
    logits = product * (scale * LOG2E)
    if mask is not None and mask.dtype.element_ty != tl.uint8:
        logits += bias
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _places(rows, p, probes, offset):
    """Queries of the probes `p`, and their places among the keys; -1 for none."""
    row = tl.load(rows + p, mask=p < probes, other=-1)
    return row, tl.where(row >= 0, row + offset, -1).to(tl.int32)


# Row r of a KV head stands for head r % GROUP of its group and probe r // GROUP, so that rows ascend in position.


@triton.jit(do_not_specialize=LENGTHS)
def _normalisers_kernel(
    query, keys, rows, mask, parts, scale, softcap, window, hidden, tokens, probes, offset, span,
    query_batch: tl.int64, query_head: tl.int64, query_token: tl.int64,
    key_batch: tl.int64, key_head: tl.int64, key_token,
    mask_batch: tl.int64, mask_head: tl.int64, mask_row: tl.int64, mask_column,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row's scores over `span` of the keys, `parts` `[splits, batch * kv_heads, rows]`."""
    row_blocks = tl.cdiv(probes * GROUP, BLOCK_R)
    row_block, pair = tl.program_id(0) % row_blocks, (tl.program_id(0) // row_blocks).to(tl.int64)
    pairs, split = tl.num_programs(0) // row_blocks, tl.program_id(1)
    batch, head = pair // KV_HEADS, pair % KV_HEADS
    r, d = row_block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    p, g = r // GROUP, r % GROUP
    row, at = _places(rows + batch * probes, p, probes, offset)
    query += batch * query_batch + head * GROUP * query_head
    q_at = query + (row * query_token + g * query_head)[:, None] + d[None, :]
    q = tl.load(q_at, mask=(row >= 0)[:, None] & (d < D)[None, :], other=0.0)
    keys += batch * key_batch + head * key_head
    if mask is not None:
        mask += (batch * mask_batch + (head * GROUP + g) * mask_head + row * mask_row)[:, None]

    begin = split * span
    end = min(begin + span, tokens)
    if mask is None:
        end = min(end, tl.max(at) + 1)
        if window is not None:
            oldest = tl.min(tl.where(at >= 0, at, tokens)) - window + 1
            begin = max(begin, oldest // BLOCK_N * BLOCK_N)
    top = tl.full([BLOCK_R], -3e38, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_at = keys + n[None, :].to(tl.int64) * key_token + d[:, None]
        k = tl.load(k_at, mask=(n < tokens)[None, :] & (d < D)[:, None], other=0.0)
        product = tl.dot(q, k, input_precision="ieee")
        logits = _logits(product, scale, softcap, at[:, None], n[None, :], tokens, window, hidden, mask, mask_column)
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    out = parts + (split * pairs + pair) * probes * GROUP + r
    tl.store(out, (top + tl.log2(total)) * LN2, mask=p < probes)


@triton.jit(do_not_specialize=["splits", "total"])
def _join_kernel(parts, lse, splits, total, BLOCK: tl.constexpr):
    """Log-sum-exp of the splits' `parts`, `[splits, total]`, for each row. Grid: blocks of rows."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < total
    top = tl.full([BLOCK], -3e38, tl.float32)  # finite: -inf - -inf would be NaN
    weight = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = tl.load(parts + split * total + r, mask=inside, other=float("-inf"))
        new_top = tl.maximum(top, part)
        weight = weight * tl.exp(top - new_top) + tl.exp(part - new_top)
        top = new_top
    tl.store(lse + r, tl.where(weight > 0, top + tl.log(weight), float("-inf")), mask=inside)


@triton.jit
def _joined(parts, sink, inside, splits, total, PARTS: tl.constexpr):
    """Log-sum-exp of `PARTS` splits' normalisers at most, which lie `total` apart, and of a sink, for each row;
    infinity where a row sees nothing, so that it has no probability.

    Args:
        parts: Where those of the first split lie, `[rows]`.
        sink: Logits of the rows' sinks, or None.
    """
    split = tl.arange(0, PARTS)
    there = (split < splits)[:, None] & inside[None, :]
    part = tl.load(parts[None, :] + (split * total)[:, None], mask=there, other=float("-inf"))
    top = tl.maximum(tl.max(part, 0), -3e38)  # finite: -inf - -inf would be NaN
    if sink is not None:
        top = tl.maximum(top, sink)
    weight = tl.sum(tl.exp(part - top[None, :]), 0)
    if sink is not None:
        weight += tl.exp(sink - top)
    return tl.where(weight > 0, top + tl.log(tl.where(weight > 0, weight, 1.0)), float("inf"))


@triton.jit(do_not_specialize=[*LENGTHS, "splits", "total"])
def _mass_kernel(
    query, keys, rows, mask, parts, sinks, out, scale, softcap, window, hidden, tokens, probes, offset, mask_heads,
    splits, total,
    query_batch: tl.int64, query_head: tl.int64, query_token: tl.int64,
    key_batch: tl.int64, key_head: tl.int64, key_token,
    mask_batch: tl.int64, mask_head: tl.int64, mask_row: tl.int64, mask_column,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean probability of a block of keys, `out` `[batch * kv_heads, tokens]`.

    Args:
        parts: Normalisers of the rows, `[splits, total]`.
    """
    blocks = tl.cdiv(tokens, BLOCK_N)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // KV_HEADS, pair % KV_HEADS
    n, d = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_at = keys + batch * key_batch + head * key_head + n[:, None].to(tl.int64) * key_token + d[None, :]
    k = tl.load(k_at, mask=(n < tokens)[:, None] & (d < D)[None, :], other=0.0)
    rows += batch * probes
    parts += pair * probes * GROUP
    query += batch * query_batch + head * GROUP * query_head
    if mask is not None:
        mask += batch * mask_batch

    seen_by = tl.zeros([BLOCK_N], tl.int32)
    first, last = probes, 0  # the probes that see some of the keys lie between
    for start in range(0, probes, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, at = _places(rows, p, probes, offset)
        seen = tl.zeros([BLOCK_N, BLOCK_P], tl.int1)
        for i in range(mask_heads):
            mask_rows = mask
            if mask is not None:
                mask_rows = mask + (i * mask_head + row * mask_row)[None, :]
            seen = seen | _seen(at[None, :], n[:, None], tokens, window, hidden, mask_rows, mask_column)[0]
        seen_by += tl.sum(seen.to(tl.int32), 1)
        sees = tl.max(seen.to(tl.int32), 0) > 0
        first = min(first, tl.min(tl.where(sees, p, probes)))
        last = max(last, tl.max(tl.where(sees, p + 1, 0)))

    mass = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first * GROUP, last * GROUP, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        p, g = r // GROUP, r % GROUP
        row, at = _places(rows, p, probes, offset)
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + head * GROUP + g)
        norm = _joined(parts + r, sink, p < probes, splits, total, PARTS) * LOG2E
        q_at = query + (row * query_token + g * query_head)[None, :] + d[:, None]
        q = tl.load(q_at, mask=(row >= 0)[None, :] & (d < D)[:, None], other=0.0)
        mask_at = mask
        if mask is not None:
            mask_at = mask + ((head * GROUP + g) * mask_head + row * mask_row)[None, :]
        product = tl.dot(k, q, input_precision="ieee")
        logits = _logits(product, scale, softcap, at[None, :], n[:, None], tokens, window, hidden, mask_at, mask_column)
        mass += tl.sum(tl.exp2(logits - norm[None, :]), 1)
    tl.store(out + pair * tokens + n, mass / (GROUP * tl.maximum(seen_by, 1)), mask=n < tokens)


class _Blocks(NamedTuple):
    """Rows and keys of a program's blocks, and options of the compiler."""

    rows: int
    keys: int
    options: dict[str, int]


def _blocks(block_d: int, dtype: torch.dtype, masked: bool) -> tuple[_Blocks, _Blocks]:
    """For the two kernels: what fits into registers without spilling, on sm_90."""
    options = {"num_warps": 8, "num_stages": 2}
    if dtype == torch.float32:  # no tensor cores
        return _Blocks(32, 32, options), _Blocks(32, 32, options)
    if masked:  # whose entries and their addresses take registers
        normalisers = _Blocks(64, 128 if block_d == 128 else 64, options)
    elif block_d > 128:
        normalisers = _Blocks(128, 64, options)
    else:
        normalisers = _Blocks(128, 128, {**options, "maxnreg": 128})  # two programs on a multiprocessor
    return normalisers, _Blocks(64, 128, {"num_warps": 8, "num_stages": 3 if block_d <= 128 else 2})


def attention_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    recent: int = 64,
    strided: int = 64,
) -> torch.Tensor:
    """As `scores.reference.attention_scores`, in two passes over the keys.

    The first takes the normaliser of each probe's softmax, the second sums the probabilities that each key receives.
    No probability is stored, and the order of every sum is fixed.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    dtypes = {query.dtype, keys.dtype}
    fits = len(dtypes) == 1 and query.dtype in DTYPES and head_dim <= 256 and recent + strided > 0
    if not fits or (mask is not None and mask.dtype not in (torch.bool, *DTYPES)):
        return twin.attention_scores(
            query, keys, scale=scale, mask=mask, window=window, softcap=softcap, sinks=sinks,
            recent=recent, strided=strided,
        )  # fmt: skip
    if not query.is_cuda and query.dtype == torch.bfloat16:  # Triton's interpreter multiplies their bits
        query, keys = query.float(), keys.float()
    rows = probe_rows(real_tokens(mask, queries), queries, recent, strided, query.device)
    rows = rows.expand(batch, -1).contiguous()
    query, keys = contiguous_rows(query), contiguous_rows(keys)
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    hidden = 0.0
    if mask is not None:
        hidden = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = mask.expand(batch, heads, -1, -1)
        mask_strides = mask.stride()
    sinks = None if sinks is None else sinks.float().contiguous()
    series, splits, joins = _passes(
        tuple(query.shape), tuple(keys.shape), query.stride()[:3], keys.stride()[:3], query.dtype, rows.shape[1],
        None if mask is None else mask.dtype, mask_strides, hidden, scale, softcap, window,
    )  # fmt: skip
    device, total = query.device, rows.numel() * heads
    out = torch.empty(batch, kv_heads, tokens, device=device)
    parts = torch.empty(splits, total, device=device)
    launches: list[tuple[torch.Tensor | None, ...]] = [(query, keys, rows, mask, parts)]
    if joins:
        joined = torch.empty(total, device=device)
        launches.append((parts, joined))
        parts = joined
    launches.append((query, keys, rows, mask, parts, sinks, out))
    with on_device(query):
        series(launches, alignments(launches[-1]))
    return out


@functools.lru_cache(maxsize=64)
def _passes(
    shape: tuple[int, ...],
    keys: tuple[int, ...],
    query_strides: tuple[int, ...],
    key_strides: tuple[int, ...],
    dtype: torch.dtype,
    probes: int,
    masked: torch.dtype | None,
    mask_strides: tuple[int, ...],
    hidden: float,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Series, int, bool]:
    """The launches of `attention_scores`, in how many splits they take the keys, and whether these are joined by one.

    Args:
        shape, keys: Of queries and keys.
        masked: Type of the mask's entries.
    """
    (batch, heads, queries, head_dim), (_, kv_heads, tokens, _) = shape, keys
    group, block_d = heads // kv_heads, max(next_power_of_2(head_dim), 16)
    first, second = _blocks(block_d, dtype, masked is not None)
    row_blocks, pairs = cdiv(probes * group, first.rows), batch * kv_heads
    splits = min(cdiv(tokens, SPLIT), cdiv(PROGRAMS, row_blocks * pairs))
    span = cdiv(cdiv(tokens, splits), first.keys) * first.keys
    splits = cdiv(tokens, span)
    joins, total = splits > PARTS, batch * heads * probes
    modes = {"KV_HEADS": kv_heads, "GROUP": group, "D": head_dim, "BLOCK_D": block_d}
    strides = {**strides_of("query", query_strides), **strides_of("key", key_strides)}
    strides |= {f"mask_{n}": k for n, k in zip(("batch", "head", "row", "column"), mask_strides, strict=True)}
    numbers = {
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "hidden": hidden,
        "tokens": tokens,
        "probes": probes,
        "offset": tokens - queries,
    }
    tensors = ("query", "keys", "rows", "mask", "parts")
    blocks = {"BLOCK_R": first.rows, "BLOCK_N": first.keys}
    launcher = Launcher(_normalisers_kernel, {**modes, **blocks}, **first.options)
    launches: list[Launch] = [
        (launcher, (row_blocks * pairs, splits, 1), tensors, {**numbers, "span": span, **strides})
    ]
    if joins:
        launcher = Launcher(_join_kernel, {"BLOCK": JOINED})
        sizes = {"splits": splits, "total": total}
        launches.append((launcher, (cdiv(total, JOINED), 1, 1), ("parts", "lse"), sizes))
    blocks = {"BLOCK_R": second.rows, "BLOCK_N": second.keys, "BLOCK_P": 32, "PARTS": PARTS}
    launcher = Launcher(_mass_kernel, {**modes, **blocks}, **second.options)
    numbers["mask_heads"] = heads if mask_strides[1] else 1
    numbers |= {"splits": 1 if joins else splits, "total": total, **strides}
    launches.append((launcher, (cdiv(tokens, second.keys) * pairs, 1, 1), (*tensors, "sinks", "out"), numbers))
    return Series(launches), splits, joins
