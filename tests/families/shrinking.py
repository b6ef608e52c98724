"""Tiny configurations of any model type: rules on the names of configuration fields, and exceptions to them.

Only fields that a configuration class has are set, so a type, a field or an exception that this version of
transformers does not know is passed over.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.families.exceptions import DROP, EXCEPTIONS

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, POSITIONS = 64, 176, 4, 160, 256
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 16
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH, SHARED_WIDTH = 4, 2, 112, 144  # no width is a multiple of 64

_NAMES: list[tuple[int, str]] = [
    (
        HIDDEN,
        "hidden_size n_embd d_model emb_dim dim embed_dim embedding_size input_embedding_size"
        " output_embedding_size word_embed_proj_dim backbone_hidden_size lru_width hidden_size_global"
        " cross_attention_hidden_size out_hidden_size pronunciation_embed_dim shape_embed_dim"
        " adapter_out_dim adapter_in_dim vision_output_dim",
    ),
    (
        INTERMEDIATE,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff"
        " d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size",
    ),
    (EXPERT_WIDTH, "moe_intermediate_size expert_ffn_hidden_size"),
    (
        SHARED_WIDTH,
        "shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"
        " encoder_layers num_encoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"
        " encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"
        " linear_num_value_heads linear_num_heads index_n_heads indexer_n_heads mamba_n_heads",
    ),
    (KEY_VALUE_HEADS, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"),
    (
        HEAD_DIM,
        "head_dim v_head_dim d_head dim_head kv_channels attention_head_size global_head_dim swa_head_dim"
        " linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim indexer_head_dim q_lora_rank"
        " kv_lora_rank o_lora_rank state_size mamba_d_state ssm_state_size router_hidden_size"
        " hidden_size_per_layer_input hc_lowrank loop_gate_rank adapter_rank",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (EXPERTS_PER_TOKEN, "num_experts_per_tok moe_k moe_topk moe_top_k top_k depth"),
    (
        VOCAB,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size output_vocab_size"
        " unpadded_vocab_size pronunciation_vocab_size shape_vocab_size",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions"
        " context_length original_max_position_embeddings relative_max_distance",
    ),
    (64, "index_topk"),  # more than a test's tokens: a choice of tokens at a tie would turn rounding into a difference
    (8, "qk_rope_head_dim qk_nope_head_dim laurel_rank rotary_dim chunk_size mamba_chunk_size o_groups"),
    (
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"
        " first_k_dense_replace num_dense_layers bos_token_id",
    ),
    (
        32,
        "sliding_window sliding_window_size attention_window_size local_attention attention_chunk_size window_size"
        " image_size block_multiple_of",
    ),
    (2, "eos_token_id"),
    (0, "pad_token_id num_mtp_layers num_nextn_predict_layers"),
]
_SIZES = {name: size for size, names in _NAMES for name in names.split()}
# Fields whose default None stands for something large, or for no such token.
_ALSO_WHERE_NONE = {
    "num_key_value_heads", "num_kv_heads", "n_inner", "ffn_hidden_size", "bos_token_id", "eos_token_id",
    "pad_token_id", "num_blocks",
}  # fmt: skip
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of ``model_type``; ``overrides`` go before rules and exceptions.

    Raises:
        KeyError: transformers does not know the type.
    """
    return _shrunk(CONFIG_MAPPING[model_type], overrides)


def _shrunk(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    fields = _fields(config_class)
    values = {name: _SIZES[name] for name, default in fields.items() if _is_size(name, default)}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = HEADS  # latent attention has as many key heads as query heads
    if fields.get("is_decoder") is False:
        values["is_decoder"] = True  # encoder classes attend to later tokens unless told otherwise
    exceptions = EXCEPTIONS.get(getattr(config_class, "model_type", ""), {})
    parts = _parts(config_class)
    for name, part in parts.items():
        if not isinstance(exceptions.get(name, {}), Mapping):
            continue
        values[name] = _shrunk(part, exceptions.get(name)).to_dict()
    values.update({name: value for name, value in exceptions.items() if name not in parts})
    values.update(overrides or {})
    return config_class(**{name: value for name, value in values.items() if value is not DROP})


def _is_size(name: str, default: Any) -> bool:
    if name not in _SIZES or isinstance(default, bool):
        return False
    if isinstance(default, int):
        return default != 0 or name in _TOKENS  # 0: the type has it, and leaves it out
    return default is None and name in _ALSO_WHERE_NONE


def _fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The names that the class takes, with their defaults."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Classes of the configurations inside a composite one, as its defaults have them."""
    names = getattr(config_class, "sub_configs", None) or {}
    try:
        made = config_class() if names else None
    except Exception:  # not every class has defaults that make a configuration
        return {name: part for name, part in names.items() if part.__name__ != "AutoConfig"}
    parts = {name: getattr(made, name, None) for name in names}
    return {name: type(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
