"""Tiny random models of many families, built from configs without a hub."""

import copy
import functools

import torch
import transformers

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 32}

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 24, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024}),
    "gpt_oss": ("GptOss", {"head_dim": 32, "sliding_window": 24, **MOE}),
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
            **MOE,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            **MOE,
        },
    ),
}
"""Class prefix and settings of each family; attention that is not plain causal is what they are here for."""


@functools.cache
def config(family: str, **changes):
    """The config of a family. `changes` must be hashable."""
    prefix, settings = FAMILIES[family]
    name = f"{prefix}TextConfig" if family == "gemma3" else f"{prefix}Config"
    return getattr(transformers, name)(**{**COMMON, **settings, **changes})


def model(family: str, attention: str | None = None, **changes):
    """A random model in float32, alike at every call. Weights are large enough for attention to discriminate."""
    return copy.deepcopy(_built(family, attention, **changes))  # what a test does to it stays there


@functools.cache
def _built(family: str, attention: str | None, **changes):
    prefix, _ = FAMILIES[family]
    name = {"gpt2": "GPT2LMHeadModel"}.get(family, f"{prefix}ForCausalLM")
    torch.manual_seed(7)
    cls = getattr(transformers, name)
    own = copy.deepcopy(config(family, **changes))  # a model writes its attention implementation into its config
    with torch.device("cpu"):  # whatever the test is about that comes first
        built = cls._from_config(own, **({"attn_implementation": attention} if attention else {}))
    assert attention is None or built.config._attn_implementation == attention
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return built.eval()


def prompt(length: int, batch: int = 1, seed: int = 0):
    """Random token ids, `[batch, length]`, none of them padding."""
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0):
    """Ids and mask of rows of these lengths, padded on the left to the longest."""
    longest = max(lengths)
    ids = prompt(longest, len(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = COMMON["pad_token_id"]
        mask[row, : longest - length] = 0
    return ids, mask
