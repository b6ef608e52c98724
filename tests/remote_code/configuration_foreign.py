from transformers import PretrainedConfig


class ForeignConfig(PretrainedConfig):
    model_type = "foreign"

    def __init__(self, vocab_size=160, hidden_size=64, units=176, num_hidden_layers=4, ffn="Plain", **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.units = units
        self.num_hidden_layers = num_hidden_layers
        self.ffn = ffn
        super().__init__(**kwargs)
