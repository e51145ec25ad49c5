"""Tiny random models of as many architectures as can be shrunk from their default configs, without a hub."""

import contextlib
import functools
import logging

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

CAUSAL = {
    **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "inkling_text": "InklingForCausalLM",
}
SEQ_TO_SEQ = {
    **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "florence2": "Florence2ForConditionalGeneration",
    "pix2struct": "Pix2StructForConditionalGeneration",
    "udop": "UdopForConditionalGeneration",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}
"""Names of model classes by model type."""

MOST_PARAMETERS = 20_000_000
LARGE = ("blt", "cohere_asr", "phi4_multimodal")
"""Those that it takes seconds to find too large."""

# fmt: off
SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_layers": 4, "n_heads": 4,
    "n_positions": 512, "n_ctx": 512, "d_model": 64, "d_ff": 64, "max_position_embeddings": 512, "ffn_dim": 64,
    "ffn_hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "decoder_layers": 4, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "sliding_window": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_expand": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "mamba_chunk_size": 8,
    "chunk_size": 8, "state_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_seq_len": 512,
    "attention_hidden_size": 64, "rnn_hidden_size": 64, "lru_width": 64, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8, "global_head_dim": 32, "n_shared_experts": 1, "ffn_hidden": 64,
    "embedding_size": 64, "dim": 64, "hidden_dim": 64, "word_embed_proj_dim": 64, "index_head_dim": 16,
    "index_n_heads": 2, "index_topk": 16, "embed_dim": 64, "rotary_dim": 16, "num_encoder_layers": 2,
    "max_source_positions": 512, "max_target_positions": 512, "max_encoder_position_embeddings": 512,
    "max_decoder_position_embeddings": 512, "attention_window": 8, "decoder_start_token_id": 1, "d_kv": 16,
    "is_decoder": True,
}
"""Sizes under the names that configs have for them."""
MLA = {"head_dim": 8, "num_key_value_heads": 4}
GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 160}
OWN: dict[str, dict] = {
    "axk1": MLA, "axk2": MLA, "deepseek_v3": MLA, "deepseek_v32": MLA, "glm4_moe_lite": MLA, "glm_moe_dsa": MLA,
    "longcat_flash": MLA, "youtu": MLA,
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 1},
    "codegen": {"rotary_dim": 16}, "gptj": {"rotary_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {**GEMMA4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "gemma4_unified_text": GEMMA4,
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2, "head_dim": 32, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_head_dim": 16, "sliding_window": 160,
    },
    "llama4_text": {"attention_chunk_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_expand": 2},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32, "attention_hidden_size": 128,
        "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_expand": 2, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16,
        "mamba_ngroups": 1, "mamba_expand": 2, "attention_hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4,
        "use_mem_rope": True,
    },
    "zaya": {"router_hidden_size": 16},
}
"""Settings of an architecture, over those above."""
HYBRID = ("falcon_h1", "inkling_text", "zamba", "zamba2", "zaya")
"""Architectures of which layers have attention and a linear attention both."""

WINDOW = 23
"""Sliding window of the decoders below: less than the encoder's tokens."""
TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}
PLAIN = {k: v for k, v in TEXT.items() if k not in ("layer_types", "sliding_window")}
BART = {
    "vocab_size": 97, "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1,
}
BERT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
ENCODER_DECODERS: dict[str, dict] = {
    "t5gemma": {"encoder": {**TEXT}, "decoder": {**TEXT}, "vocab_size": 97},
    "t5gemma2": {
        "encoder": {
            "text_config": {**TEXT}, "vision_config": {**VISION, "image_size": 32, "patch_size": 16},
            "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
        },
        "decoder": {**TEXT}, "image_token_index": 90, "eoi_token_index": 92,
    },
    "dia": {
        "encoder_config": {**PLAIN, "num_key_value_heads": 4},
        "decoder_config": {
            **PLAIN, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 16,
            "cross_hidden_size": 64, "num_channels": 3,
        },
        "delay_pattern": [0, 1, 2], "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2,
    },
    "florence2": {
        "text_config": {"model_type": "bart", **BART}, "image_token_id": 90,
        "vision_config": {"embed_dim": [16, 32, 64, 64], "num_heads": [1, 2, 4, 4], "num_groups": [1, 2, 4, 4],
                          "depths": [1, 1, 1, 1], "projection_dim": 64},
    },
    "pix2struct": {
        "text_config": {"vocab_size": 97, "hidden_size": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                        "use_cache": True},
        "vision_config": {"hidden_size": 64, "patch_embed_hidden_size": 64, "d_ff": 64, "d_kv": 16,
                          "num_hidden_layers": 1, "num_attention_heads": 4},
    },
    "moonshine": {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
        "pad_token_id": 0, "eos_token_id": None,
    },
    "whisper": {**BART, "num_mel_bins": 16, "max_source_positions": 60, "max_target_positions": 512},
    "encoder-decoder": {
        "encoder": {"model_type": "bert", **BERT},
        "decoder": {"model_type": "bert", **BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit", **VISION, "image_size": 32, "patch_size": 16},
        "decoder": {"model_type": "trocr", **{k: v for k, v in BART.items() if "encoder" not in k}},
    },
    "canary": {
        "vocab_size": 97, "decoder_config": {**PLAIN},
        "encoder_config": {**VISION, "num_mel_bins": 16},
    },
}
"""Whole settings of encoder-decoders with nested configs; the others are shrunk like decoders."""
# fmt: on


def shrunk(model_type: str):
    """A small config of a model type: of its text part, where it is a whole of several.

    Raises:
        Whatever the config's class says of the sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    text = default if default.is_encoder_decoder else default.get_text_config(decoder=True)
    known = text.to_dict().keys() | getattr(text, "attribute_map", {}).keys()
    declared = getattr(type(text), "__dataclass_fields__", {}).keys() | {"global_head_dim"}
    if default.is_encoder_decoder:
        declared -= {"is_decoder"}
    settings = {k: v for k, v in SMALL.items() if k in known or k in declared} | OWN.get(text.model_type, {})
    for _ in range(6):
        try:
            return type(text)(**settings)
        except Exception as problem:
            bad = next((k for k in settings if k in str(problem) and k not in OWN.get(text.model_type, {})), None)
            if bad is None:
                raise
            del settings[bad]  # a property there, or of another form
    raise ValueError(f"no small config of {model_type}")


@functools.cache
def zoo_model(model_type: str, names: str):
    """A random model, with weights large enough for attention to discriminate, or the reason why there is none.

    Args:
        model_type: A key of `CAUSAL` or `SEQ_TO_SEQ`.
        names: `"causal"` or `"seq_to_seq"`.
    """
    if model_type in LARGE:
        return "nested configs that are not shrunk"
    name = {"causal": CAUSAL, "seq_to_seq": SEQ_TO_SEQ}[names][model_type]
    logging.disable(logging.WARNING)
    try:
        if model_type in ENCODER_DECODERS:
            config = CONFIG_MAPPING[model_type](**ENCODER_DECODERS[model_type])
        else:
            config = shrunk(model_type)
        cls = getattr(transformers, name if isinstance(name, str) else name[0])
        with contextlib.suppress(NotImplementedError), torch.device("meta"):  # which some need real tensors for
            size = sum(parameter.numel() for parameter in cls._from_config(config).parameters())
            if size > MOST_PARAMETERS:
                return f"{size} parameters are left"
        torch.manual_seed(7)
        built = cls._from_config(config).eval()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:200]
    finally:
        logging.disable(logging.NOTSET)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return built
