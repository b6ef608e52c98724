"""What oneDNN, by which torch multiplies matrices of a low precision on a CPU, does on this machine."""

from __future__ import annotations

from functools import cache

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 or float16 here: it takes instructions for them, or AVX-512.

    Elsewhere torch's own products come in, and are slow: one of 512 tokens with 896 x 4864 took 0.22 s in bfloat16 on
    an AVX2 machine, 0.03 s in float32 (timed by hand).
    """
    if not torch.backends.mkldnn.is_available():
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, supported)())
