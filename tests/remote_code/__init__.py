"""A decoder whose code lies beside its weights, as ``trust_remote_code`` loads it: `remote_folder`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
CONFIG = {
    "model_type": "foreign",
    "architectures": ["ForeignForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_foreign.ForeignConfig",
        "AutoModelForCausalLM": "modeling_foreign.ForeignForCausalLM",
    },
}


def remote_folder(folder: Path, ffn: str) -> Path:
    """Write a random decoder with its code to ``folder``; ffn: the class of `modeling_foreign` in its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    folder.mkdir(parents=True)
    for name in ("configuration_foreign.py", "modeling_foreign.py"):
        shutil.copy(HERE / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "ffn": ffn}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide one that is forgotten
                parameter.add_(0.2 * torch.randn(parameter.shape))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder
