"""One streamed pass over the calibration text: what the fits need to know of each FFN, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sedac_hf.errors import CalibrationError, EvaluationError
from sedac_hf.evaluation import Batch, WindowSet, check_finite, make_batch, nll_of_logits, scored_logits
from sedac_hf.evaluation.scoring import batches, default_batch_size, input_device, vocabulary_size
from sedac_hf.ffn.deciders import SiteUnits, importance_of
from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.ops.contract import is_ordinary
from sedac_hf.runtime import SedacRuntime

_ORDERED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_IMPORTANCE_ROWS = 768  # tokens per FFN whose importances are kept ...
_IMPORTANCE_VALUES = 1 << 18  # ... and at most so many values of them


@dataclass
class Statistics:
    """What one pass leaves, per FFN in site order, float32, units in natural order.

    power: E[h_j^2] [f]; mean: E[h_j] [f]; moment: E[h h^T] [f, f], or None where memory is short or it is not needed;
    importance: sorted sample of the units' importances, or None. Of experts, h is weighted by the router, 0 for tokens
    that go elsewhere; power and mean are [E, f], and there are no moments.
    dense_perplexity: of the fit part.
    """

    tokens: int = 0
    dense_perplexity: float = float("nan")
    power: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    moment: list[Tensor | None] = field(default_factory=list)
    importance: list[Tensor] = field(default_factory=list)


def stream(runtime: SedacRuntime, windows: WindowSet, progress: bool, description: str) -> Iterator[Batch]:
    """The windows as batches on the model's device, with a progress bar."""
    groups = list(batches(windows, default_batch_size(runtime.model, windows.context)))
    device = input_device(runtime.model)
    for group in tqdm(groups, desc=description, unit="batch", disable=not progress):
        yield make_batch(group, device)


def check_weights(runtime: SedacRuntime) -> None:
    """Raise CalibrationError, which names them, where ordinary parameters of the model hold NaN.

    Infinite ones show in the logits, or do no harm.
    """
    bad = [
        name
        for name, parameter in runtime.model.named_parameters()
        if is_ordinary(parameter) and parameter.dtype in _ORDERED and parameter.numel() and not parameter.is_meta
        # The least value is NaN where one is, and no copy is made to find it.
        if bool(torch.isnan(parameter.detach().amin()))
    ]
    if bad:
        raise CalibrationError(
            f"the model's weights must be finite numbers, got NaN in {', '.join(bad[:3])}"
            f"{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}: load or download the model again"
        )


def check_tokenizer(runtime: SedacRuntime, *parts: WindowSet) -> None:
    """Raise CalibrationError where the text has token ids that the model does not have."""
    vocabulary = vocabulary_size(runtime.model)
    largest = max(part.max_token_id for part in parts)
    if vocabulary is not None and largest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer must fit the model: it gave the token id {largest}, the model's embedding has "
            f"{vocabulary} rows; load the tokenizer that belongs to the model"
        )


def check_dense(runtime: SedacRuntime, perplexity: float) -> None:
    """Raise CalibrationError where the model predicts the text no better than chance."""
    vocabulary = vocabulary_size(runtime.model)
    if vocabulary is not None and not perplexity < vocabulary:
        raise CalibrationError(
            f"the model must predict the text better than chance, got a perplexity of {perplexity:.4g} over "
            f"{vocabulary} tokens: is it the model's own tokenizer, and are the weights trained?"
        )


def collect(
    runtime: SedacRuntime, windows: WindowSet, *, select: bool, moment_bytes: int, progress: bool
) -> Statistics:
    """Run the bare model once over the windows.

    Args:
        select: sample importances (needs the shadows); otherwise moments of the hidden units.
        moment_bytes: memory for the second moments over all FFNs; where they need more, none are kept.

    Raises:
        CalibrationError: NaN or infinite logits, or a perplexity worse than chance.
    """
    sites = runtime.sites
    sizes = [site.intermediate_size for site in sites]
    single = [site.experts is None for site in sites]
    keep_moments = (
        not select and 4 * sum(f * f for f, alone in zip(sizes, single, strict=True) if alone) <= moment_bytes
    )
    device = input_device(runtime.model)
    shapes = [(f,) if site.experts is None else (site.experts.count, f) for f, site in zip(sizes, sites, strict=True)]
    zeros = [torch.zeros(shape, device=device) for shape in shapes]
    power, mean = zeros, [z.clone() for z in zeros]
    moment: list[Tensor | None] = [
        torch.zeros(f, f, device=device) if keep_moments and alone else None
        for f, alone in zip(sizes, single, strict=True)
    ]
    samples: list[list[Tensor]] = [[] for _ in sites]
    step = max(1, windows.n_tokens // _IMPORTANCE_ROWS)
    total_nll, seen = 0.0, 0

    def on_ffn(i: int, x: Tensor, h: Tensor) -> None:
        if select:
            deciding = runtime.weights.shadows[i]
            if isinstance(deciding, Shadow | ExactGate | SiteUnits):
                samples[i].append(importance_of(deciding, x[::step], h[::step]).flatten().float().cpu())
            return
        h = h.float()
        _add(power, i, h.square().sum(0))
        _add(mean, i, h.sum(0))
        if keep_moments:
            second = moment[i]
            assert second is not None
            if h.device == second.device:
                second.addmm_(h.T, h)  # in place: a product of its own would be as large as the moment
            else:
                second.add_((h.T @ h).to(second.device))

    def on_expert(i: int, expert: int, x: Tensor, h: Tensor, weights: Tensor) -> None:
        if select:
            importance = runtime.weights.importance(i)
            kept = slice(len(samples[i]) % step, None, step)  # an expert may have few rows of each batch
            if importance is not None and x[kept].shape[0]:
                worth = importance(x[kept], expert, h[kept]) * weights[kept].float().abs()[:, None]
                samples[i].append(worth.flatten().float().cpu())
            return
        h = h.float() * weights.float()[:, None]
        power[i] = power[i].to(h.device)
        mean[i] = mean[i].to(h.device)
        power[i][expert] += h.square().sum(0)
        mean[i][expert] += h.sum(0)

    rows = 0
    with runtime.observe(on_ffn=on_ffn, on_expert=on_expert):
        for batch in stream(runtime, windows, progress, "statistics"):
            nll = nll_of_logits(scored_logits(runtime.model, batch), batch.targets)
            try:
                check_finite(nll, batch)
            except EvaluationError as error:
                raise CalibrationError(f"calibration needs finite logits: {error}") from error
            total_nll += float(nll.double().sum())
            seen += nll.numel()
            rows += batch.input_ids.numel()
    perplexity = float(torch.tensor(total_nll / seen, dtype=torch.float64).exp())
    check_dense(runtime, perplexity)
    return Statistics(
        tokens=seen,
        dense_perplexity=perplexity,
        power=[p.cpu() / rows for p in power],
        mean=[m.cpu() / rows for m in mean],
        moment=[None if m is None else m.div_(rows).cpu() for m in moment],  # in place: they may be large
        importance=[_sorted_sample(values) for values in samples] if select else [],
    )


def _add(totals: list[Tensor], i: int, values: Tensor) -> None:
    totals[i] = totals[i].to(values.device).add_(values)


def _sorted_sample(values: list[Tensor]) -> Tensor:
    merged = torch.cat(values)
    if merged.numel() > _IMPORTANCE_VALUES:
        keep = torch.randperm(merged.numel(), generator=torch.Generator().manual_seed(0))[:_IMPORTANCE_VALUES]
        merged = merged[keep]
    return merged.sort().values
