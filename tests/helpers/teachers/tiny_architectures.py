"""A tiny configuration of any causal language model of transformers, made from its configuration class.

    config = tiny_config("llama4")       # a few layers, width 32; nested configurations likewise

Every setting that has one of the names below gets the size below; lists with one item per layer are made again by the
class. So a new architecture needs an entry of its own only if it has sizes of a new name, or rules of its own.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

VOCAB, WIDTH, LAYERS, HEADS, HEAD, WINDOW, POSITIONS = 408, 32, 4, 4, 8, 8, 64

_NAMES: tuple[tuple[int, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (
        WIDTH,
        "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size lru_width attention_hidden_size "
        "input_embedding_size output_embedding_size word_embed_proj_dim backbone_hidden_size embed_dim",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length model_max_length max_target_positions "
        "context_length max_source_positions",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks encoder_layers "
        "num_encoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads "
        "attention_heads num_query_groups swa_num_attention_heads encoder_attention_heads num_encoder_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k "
        "linear_num_key_heads linear_num_value_heads full_attention_interval n_group topk_group "
        "global_attn_every_n_layers sliding_window_pattern _sliding_window_pattern layer_group_size "
        "attn_layer_period no_rope_layer_interval linear_num_heads num_codebooks top_k_experts "
        "num_expert_group",
    ),
    (
        4,
        "num_experts n_routed_experts num_local_experts moe_num_experts linear_conv_kernel_dim n_mamba_heads "
        "mamba_n_heads mamba_num_heads",
    ),
    (
        1,
        "first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers "
        "num_kv_shared_layers attn_layer_offset num_nextn_predict_layers n_groups mamba_n_groups mamba_ngroups",
    ),
    (
        HEAD,
        "head_dim d_kv qk_rope_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim index_head_dim kv_channels d_head dim_head rotary_dim swa_head_dim attention_head_size "
        "sliding_window window_size local_attention attention_window_size sliding_window_size attention_chunk_size "
        "state_size ssm_state_size mamba_d_state index_topk mamba_chunk_size chunk_size mamba_dt_rank time_step_rank",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank moe_intermediate_size shared_expert_intermediate_size o_lora_rank "
        "hidden_size_per_layer_input query_pre_attn_scalar qk_head_dim mamba_d_head mamba_head_dim mamba_headdim "
        "shared_intermediate_size index_n_heads",
    ),
    (
        48,
        "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_hidden_size ffn_dim n_inner dff dim_ff d_inner "
        "feed_forward_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size image_size",
    ),
)
SIZES = {name: size for size, names in _NAMES for name in names.split()}
DEVIATIONS = ("initializer_range", "init_std", "initializer_factor")

# Settings of single architectures.
OWN: dict[str, dict[str, Any]] = {
    **{
        name: {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
        for name in ("gemma4_text", "gemma4_unified_text")
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert-generation": {"is_decoder": True},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"initializer_range": 0.1},  # runs its layers again and again, and rounding errors with them
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# Position embeddings that depend on the length of a text, or switch at one.
ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    },
}
VARIANTS = [*(f"llama, {kind}" for kind in ROTARY), "phi3, longrope"]


def tiny_config(name: str) -> PreTrainedConfig:
    """A model type, or one of VARIANTS. Causal also where a family has masked models too."""
    model_type, _, kind = name.partition(", ")
    config = _tiny(CONFIG_MAPPING[model_type])
    if kind:
        config.rope_parameters = {
            "rope_type": kind,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            **ROTARY[kind],
        }
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = 32
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        config.is_decoder = True
    return config


def _tiny(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = kind()
    settings: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = _tiny(type(value))
        elif name in DEVIATIONS:
            settings[name] = 0.3  # with the usual 0.02 every token has nearly the same probability
        elif name in SIZES and value is not None and not isinstance(value, bool):
            settings[name] = SIZES[name]
    if settings.keys() >= {"num_key_value_heads", "num_attention_heads"}:
        if default.num_key_value_heads == default.num_attention_heads:
            settings["num_key_value_heads"] = HEADS
    return kind(**settings | OWN.get(kind.model_type, {}))
