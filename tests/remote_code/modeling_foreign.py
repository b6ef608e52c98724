"""A decoder with a causal mean for attention (no cache), and FFNs of several makes."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_foreign import ForeignConfig


class Gated(nn.Module):
    """What the structural rules know, under names of its own."""

    def __init__(self, d, f):
        super().__init__()
        self.w_gate, self.w_in, self.w_out = nn.Linear(d, f), nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x):
        return self.w_out(nn.functional.silu(self.w_gate(x)) * self.w_in(x))


class TwoBranches(nn.Module):
    """Two FFNs of the same sizes side by side: which linears belong together, no shape tells."""

    def __init__(self, d, f):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(d, f), nn.Linear(f, d)
        self.mem_in, self.mem_out = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.fc_out(self.act(self.fc_in(x))) + 0.3 * self.mem_out(torch.tanh(self.mem_in(x)))


class Normed(nn.Module):
    """A norm over the units, and a map of the same size that has nothing to do with them."""

    def __init__(self, d, f):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(d, f), nn.Linear(f, d)
        self.norm = nn.LayerNorm(f)
        self.key, self.value = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x):
        return self.fc_out(self.norm(torch.relu(self.fc_in(x)))) + self.value(torch.sin(self.key(x)))


class Scaled(nn.Module):
    """A linear map that is none of torch's."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.weight, self.scale = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5), nn.Parameter(torch.ones(1))
        self.bias = None

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.scale


class Odd(nn.Module):
    """Unusual linears, gate and up in one, kept where attention is by its name."""

    def __init__(self, d, f):
        super().__init__()
        self.both, self.back = Scaled(d, 2 * f), Scaled(f, d)

    def forward(self, x):
        first, second = self.both(x).chunk(2, dim=-1)
        return self.back(torch.relu(first) * second)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.norm, self.attn, self.ffn_norm = nn.LayerNorm(d), nn.Linear(d, d), nn.LayerNorm(d)
        self.mixer_conv = globals()[config.ffn](d, config.units) if config.ffn != "Gated" else None
        self.ffn = Gated(d, config.units) if config.ffn == "Gated" else None

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.attn(self.norm(x)).cumsum(1) / steps
        return x + (self.ffn or self.mixer_conv)(self.ffn_norm(x))


class ForeignPreTrainedModel(PreTrainedModel):
    config_class = ForeignConfig
    base_model_prefix = "body"

    def _init_weights(self, module):
        pass


class Body(ForeignPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ForeignForCausalLM(ForeignPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.body = Body(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **kwargs):
        hidden = self.body(input_ids, inputs_embeds)
        return CausalLMOutputWithPast(logits=self.head(hidden))
