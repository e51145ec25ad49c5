"""The perplexity protocol of the paper's released code (arXiv 2606.08635), with what is wrong with it.

Keys and values are rounded and restored ("fake-quantised") where `k_proj` and `v_proj` put them out, before RoPE, in
the same teacher-forced forward that is scored: there is no cache, prefill itself is degraded, and bytes are nominal.
A token has one symmetric abs-max scale for all its KV heads together. Dropping baselines see only the tokens that they
keep, and are scored on those alone, so that their numbers are of other tokens than everyone else's.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrumkv_hf.policy import FP16, TIERS, DropScored, Policy
from spectrumkv_hf.policy.importance import importance
from spectrumkv_hf.probe.divergence import mean_loss

PROJECTIONS = ("k_proj", "v_proj")


def fake_quantise(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Every token rounded to its precision and back: `scale = max|x| / (2**(bits - 1) - 1)` over all channels.

    Args:
        x: `[..., tokens, channels]`.
        bits: int64 `[tokens]`; tokens of 16 bits, and of 0, which attention will not see, pass unchanged.
    """
    top = (2.0 ** (bits.clamp(min=2) - 1) - 1).unsqueeze(-1)
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / top
    rounded = (wide / scale.where(scale > 0, 1.0)).round().clamp(-top, top) * scale
    kept = (bits == FP16.bits) | (bits == 0)
    return x.where(kept.unsqueeze(-1), rounded.to(x.dtype))


def tier_bits(policy: Policy, tokens: int) -> torch.Tensor:
    """Bits of every token of a text under a policy, int64 `[tokens]`; 0 where it is dropped.

    Counts are the policy's. Ranking by its importance, with the sinks first unless it is random; what reads attention
    is not to be had here.
    """
    nothing = torch.zeros(1, 1, tokens, 1)
    score = importance(policy, None, nothing, nothing, start=0, seen=tokens)[0, 0]
    if policy.importance != "random":
        score[: policy.sinks] = torch.inf
    counts = policy.counts(tokens)
    ordered = [tier.bits for tier in TIERS for _ in range(counts.get(tier, 0))]
    bits = torch.empty(tokens, dtype=torch.int64)
    bits[score.argsort(descending=True, stable=True)] = torch.tensor(ordered)
    return bits


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """The linear layers of the decoder that put out keys and values.

    Raises:
        ValueError: there are none by the names that the paper's hooks look for.
    """
    found = [module for name, module in model.get_decoder().named_modules() if name.split(".")[-1] in PROJECTIONS]
    if not found:
        raise ValueError(
            f"the paper's protocol hooks modules named {' and '.join(PROJECTIONS)}, and {type(model).__name__} has "
            "none: its projection is fused or named otherwise"
        )
    return found


@contextmanager
def quantised_projections(model: PreTrainedModel, bits: torch.Tensor) -> Iterator[None]:
    """Fake-quantise keys and values of texts of `len(bits)` tokens while the context is open."""
    bits = bits.to(model.device)

    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return fake_quantise(output, bits)

    handles = [module.register_forward_hook(hook) for module in projections(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def fake_quantised_loss(model: PreTrainedModel, ids: torch.Tensor, policy: Policy) -> tuple[float, float]:
    """Mean negative log-likelihood of a text under the paper's protocol, and the nominal ratio.

    Args:
        model: In eval mode.
        ids: `[1, tokens]`, on the model's device.
        policy: One that drops tokens and quantises none gets the text without them, at the original positions, and the
            loss is of what is left; with others all tokens are scored, and none attends to what was dropped.

    Raises:
        ValueError: see `projections`.
    """
    tokens = ids.shape[1]
    bits = tier_bits(policy, tokens)
    nominal = float(sum(float(tier.cost) * count for tier, count in policy.counts(tokens).items()) / tokens)
    kept = bits > 0
    if isinstance(policy, DropScored):
        positions = kept.nonzero()[:, 0].to(ids.device)
        ids = ids[:, positions]
        mask = torch.ones_like(ids)  # without one, Transformers takes the gap for the border of two packed texts
        logits = model(input_ids=ids, position_ids=positions[None], attention_mask=mask, use_cache=False).logits
    else:
        with quantised_projections(model, bits):
            mask = kept.to(ids)[None]
            positions = torch.arange(tokens, device=ids.device)[None]
            logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    return mean_loss(logits[0], ids[0]), nominal


def perplexity_change(losses: list[float], exact: list[float]) -> float:
    """Percent, of the means over the windows of each window's perplexity, as the paper takes them."""
    return 100 * (sum(map(math.exp, losses)) / sum(map(math.exp, exact)) - 1)
