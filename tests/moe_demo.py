"""The embedded decoder as a mixture of experts: each FFN is dealt out to experts of which every token uses all."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from sedac_hf import demo_path

EXPERTS = 4


@torch.no_grad()
def moe_of_demo() -> PreTrainedModel:
    """A Mixtral that computes what the embedded decoder does, up to rounding: a trained mixture of experts.

    Expert e holds every fourth unit from e on, with four times its down, and a router of zeros gives each a quarter.
    """
    base = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    values = base.config.to_dict()
    shared = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    shared += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id")
    config = MixtralConfig(
        **{name: values[name] for name in (*shared, "eos_token_id", "pad_token_id")},
        intermediate_size=values["intermediate_size"] // EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config).float().eval()
    state = base.state_dict()
    model.load_state_dict({name: tensor for name, tensor in state.items() if ".mlp." not in name}, strict=False)
    for idx, layer in enumerate(model.model.layers):
        mlp = base.model.layers[idx].mlp
        layer.mlp.gate.weight.zero_()
        for expert in range(EXPERTS):
            units = slice(expert, None, EXPERTS)
            rows = torch.cat((mlp.gate_proj.weight[units], mlp.up_proj.weight[units]))
            layer.mlp.experts.gate_up_proj[expert] = rows
            layer.mlp.experts.down_proj[expert] = EXPERTS * mlp.down_proj.weight[:, units]
    return model
