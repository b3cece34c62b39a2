"""Tiny configs of many architectures, with the features on that decide what a token sees: windows,
chunks, sinks, soft caps, partial rotary embeddings, scales of logits, experts, states."""

from __future__ import annotations

from typing import Any

VOCAB = 97
WINDOW = 5
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_KEY_HEADS = {"num_key_value_heads": None}
_OLD_NAMES = {
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
}
_SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_HALF_SLIDING = {
    **_SLIDING_THEN_FULL,
    "sliding_window": WINDOW,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
_STATES = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}

# The nine that every run of the tests holds to exactness and to TRL.
USUAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "gemma2": {
        **_HALF_SLIDING,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": _HALF_SLIDING,
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "gpt_neox": {"rotary_pct": 0.25, **_NO_KEY_HEADS},
}
MORE: dict[str, dict[str, Any]] = {
    "bloom": {**_OLD_NAMES, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {**_SLIDING_THEN_FULL, "sliding_window": WINDOW, "logit_scale": 0.25},
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "falcon_h1": {**_STATES, "lm_head_multiplier": 0.5, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma3n_text": {
        **_HALF_SLIDING,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "query_pre_attn_scalar": None,
    },
    "glm4": {"head_dim": 8},
    "glm4_moe": {
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt2": {
        **_OLD_NAMES,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_oss": {
        **_SLIDING_THEN_FULL,
        "sliding_window": WINDOW,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "expand": 2,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "num_attention_heads": None,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "max_position_embeddings": None,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo3": {**_SLIDING_THEN_FULL, "sliding_window": WINDOW},
    "opt": {
        **_NO_KEY_HEADS,
        "ffn_dim": 48,
        "word_embed_proj_dim": 24,
        "intermediate_size": None,
        "dropout": 0.0,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
}
ARCHITECTURES = {**USUAL, **MORE}

# The first tier that is exact for sequences longer than a window; `shared` unless said.
TIERS = {
    "bloom": "padded",
    "falcon_h1": "padded",
    "lfm2": "padded",
    "llama4_text": "packed",
    "mamba2": "padded",
    "nemotron_h": "padded",
    "qwen3_5_text": "padded",
}
