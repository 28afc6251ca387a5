"""A tiny configuration of every architecture of language models that transformers has."""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmntk.models.families import AUTO_CLASSES, CAUSAL, MASKED

VOCABULARY = 64
# What sizes are called, in whatever configuration.
_NAMES = {
    64: """vocab_size max_position_embeddings n_positions n_ctx max_seq_len block_size index_topk rel_extent
        pronunciation_vocab_size shape_vocab_size entity_vocab_size vocab_size_per_layer_input unpadded_vocab_size
        decoder_vocab_size encoder_hash_byte_group_vocab position_bias_max_distance max_2d_position_embeddings""",
    24: """intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim d_inner dff ffn_hidden_size dim_ff
        dense_intermediate_size intermediate_size_mlp""",
    16: """hidden_size d_model n_embd dim emb_dim embedding_size embed_dim word_embed_proj_dim hidden_dim qk_head_dim
        input_embedding_size output_embedding_size lru_width pronunciation_embed_dim shape_embed_dim entity_emb_size
        pooler_hidden_size embedding_dim""",
    8: """head_dim rotary_dim d_head qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank o_lora_rank
        index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim d_rel mamba_d_state
        state_size ssm_state_size time_step_rank mamba_dt_rank mamba_chunk_size chunk_size mamba_head_dim dim_head
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size laurel_rank
        shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        hidden_size_per_layer_input""",
    4: """num_local_experts num_experts n_routed_experts moe_num_experts linear_num_heads index_n_heads zero_expert_num
        linear_num_key_heads linear_num_value_heads mamba_num_heads""",
    2: """num_hidden_layers n_layers n_layer num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers num_layers_per_stack num_attention_heads n_heads n_head num_heads num_kv_heads kv_n_heads
        encoder_attention_heads decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        num_key_value_heads mamba_n_heads swa_num_attention_heads swa_num_key_value_heads num_experts_per_tok moe_k
        moe_topk type_vocab_size eos_token_id""",
    1: "bos_token_id",
    0: "pad_token_id",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
# Where these do not make an architecture small, or not one that fits together.
_OWN: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "n_embd": 32},
    "dots1": {"n_shared_experts": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": [4, 4]},
    "mamba2": {"num_heads": 4},
    "ministral": {"head_dim": 8},
    "mobilebert": {"true_hidden_size": 8, "intra_bottleneck_size": 8, "embedding_size": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "mpnet": {"pad_token_id": 1},
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": 64, "segment_means_seq_len": 64},
    "perceiver": {
        "d_latents": 16,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "qk_channels": 16,
        "v_channels": 16,
    },
    "reformer": {
        "axial_pos_embds_dim": [8, 8],
        "axial_pos_shape": [8, 8],
        "attention_head_size": 8,
        "feed_forward_size": 24,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> list[tuple[str, str]]:
    """Name every architecture and form: ``("bert", "masked")``, ``("bert", "causal")``, …"""
    return [(kind.model_type, family) for family, auto in AUTO_CLASSES.items() for kind in list(auto._model_mapping)]


def tiny_config(model_type: str, family: str, **settings: Any) -> PretrainedConfig:
    """Return a configuration of two layers of 16 features, its decoder untied.

    Args:
        model_type: The architecture, as transformers calls it.
        family: ``"masked"`` or ``"causal"``.
        **settings: What is to be otherwise.
    """
    kind = CONFIG_MAPPING[model_type]
    config = _shrunk(kind, {**_OWN.get(model_type, {}), **settings})
    config.tie_word_embeddings = False
    if family == CAUSAL and kind in AUTO_CLASSES[MASKED]._model_mapping:
        config.is_decoder = True
    return config


def _shrunk(kind: Any, settings: dict[str, Any]) -> PretrainedConfig:
    default = kind()
    small: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in kind.sub_configs and isinstance(value, dict):
            small[name] = _shrunk(type(getattr(default, name)), {}).to_dict()
        elif isinstance(value, int) and not isinstance(value, bool) and name in _SIZES:
            small[name] = _SIZES[name]
    return kind(**{**small, **settings})
