"""What the rules of `shrinking` get wrong, by model type, and the types that are not built."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

DROP = object()  # leave the class's default

_HALF_LINEAR = ["linear_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}

# By the ``model_type`` of a configuration class, also of one inside a composite; a mapping in it is for an inner one.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Layers of different kinds: defaults repeat after more layers than these decoders have.
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "gemma3n_text": {  # two layers with the statistics over all hidden units that the large ones have
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0],
    },
    "granitemoeshared": {"shared_intermediate_size": 144},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoe_swa": {"shared_intermediate_size": 144},
    "granitemoehybrid": {"layer_types": _HALF_LINEAR, "shared_intermediate_size": 144, "num_local_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_hidden_layers": 5},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"num_hidden_layers": 6},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "moe", "mlp"],
        "num_hidden_layers": DROP,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {"num_hidden_layers": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [], **_INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 6},
    "zamba": {"num_hidden_layers": 9, "attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid"] * 2 + ["mamba", "mamba"],
        "n_mamba_heads": 8,
    },
    # Sizes that depend on each other.
    "blt": {
        "vocab_size": 260,  # bytes and special tokens
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 500,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260},
        "decoder_config": {"vocab_size": 260},
        "use_cache": False,
    },
    "cpmant": {"prompt_types": 4, "prompt_length": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "downsample_hidden_size": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "xlstm": {"head_dim": DROP, "qk_dim_factor": 1.0, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {
        "attn_layers": ["local"] * 4,  # which tokens share a bucket in "lsh" depends on later ones
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [24, 40],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    # What the defaults leave open.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64},
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}

# Types that no decoder is built of, and why.
NOT_BUILT: dict[str, str] = {
    "gemma4_assistant": "a drafter: its forward needs the keys and values of a target model",
    "gemma3n": "its image encoder needs the timm package; gemma3n_text has the same decoder",
    "gemma4_unified_assistant": "a drafter: its forward needs the keys and values of a target model",
}
if Version(transformers.__version__) < Version("5.24"):
    NOT_BUILT |= dict.fromkeys(
        ["dbrx", "musicgen", "musicgen_melody"], "configurations of earlier versions take no defaults from a mapping"
    )
