"""What is changed on a decoder while a runtime is attached: hooks, and the forwards of FFNs and large linear maps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from sedac_hf.ffn.coupled import forward_replacements, masked_because
from sedac_hf.runtime.decode_linears import DecodeLinear, decode_linears
from sedac_hf.runtime.hooks import Attachment
from sedac_hf.runtime.units_linears import units_linears

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


class Attached(NamedTuple):
    """How to undo it; the linears that kernels may run; why, of each FFN that is cut by zeroing alone."""

    attachment: Attachment
    decode_linears: tuple[DecodeLinear, ...]
    masked: tuple[str, ...]


def attach(runtime: SedacRuntime) -> Attached:
    """Put hooks on the checkpoint layers and around the forward, and make the FFNs cuttable; all of it or nothing."""
    attachment, execution = Attachment(), runtime.captured.fresh()
    kernels = runtime.weights.uses_kernels and runtime.policy is not None
    masked: list[str | None] = []
    linears: tuple[DecodeLinear, ...] = ()
    try:
        attachment.around_forward(runtime.model, execution.begin, execution.end)
        for idx, layer in enumerate(runtime.checkpoint_layers):
            attachment.after_forward(runtime.decoder_layers[layer], functools.partial(execution.decide, idx))
        for i, site in enumerate(runtime.sites):
            cuts = execution.site_cuts
            replacements = forward_replacements(
                site,
                functools.partial(cuts.cut, i),
                functools.partial(cuts.decoded, i) if kernels else None,
                functools.partial(cuts.uneven, i),
                functools.partial(runtime.weights.expert_kernels, i) if kernels else None,
            )
            masked.append(masked_because(replacements))
            attachment.replace_forwards(execution.parts.of_site(i, site, replacements))
        if kernels:
            ours = {id(linear) for site in runtime.sites for linear in site.linears}
            linears = tuple(decode_linears(runtime.model, ours, runtime.kernel_choice.linear_by_kernel))
            attachment.replace_forwards(execution.parts.of_linears(linears))
            if runtime.policy is not None and runtime.policy.cut == "select":
                down = [(linear.module, linear.forward) for linear in units_linears(runtime.sites)]
                attachment.replace_forwards(execution.parts.untouched(down))
    except BaseException:
        attachment.detach()
        raise
    return Attached(attachment, linears, tuple(reason for reason in masked if reason is not None))
