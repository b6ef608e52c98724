"""The controller without a model: risks in, keep levels out.

    python examples/controller_alone.py

For whoever has probes and a decoder of their own: this is all that the law needs to know.
"""

from __future__ import annotations

import numpy as np

from sedac_hf import CascadeController, LayerConfig

CONFIGS = [
    LayerConfig(layer_idx=3, target_exit_rate=0.2, initial_threshold=0.8, confidence_weight=0.3),
    LayerConfig(layer_idx=6, target_exit_rate=0.5, initial_threshold=1.0, confidence_weight=0.4),
    LayerConfig(layer_idx=9, target_exit_rate=0.8, initial_threshold=1.2, confidence_weight=0.3),
]
# Rows are checkpoints, columns are tokens: an easy token, one that turns hard, a hard one, and a broken probe.
RISK = np.array([[0.02, 0.10, 0.9, 0.1], [0.03, 0.90, 1.5, np.nan], [0.01, 1.40, 2.0, 0.1]], dtype=np.float32)


def main() -> None:
    controller = CascadeController(CONFIGS, alpha=0.1, confidence_decay=0.9, soft_exit=True, n_levels=8)

    print("all checkpoints at once, as a sweep over recorded risks would ask:")
    decisions = controller.evaluate_batch(RISK)
    for token, decision in enumerate(decisions):
        ratios = " ".join(f"{ratio:.3f}" for ratio in decisions.ratios[:, token])
        print(
            f"  token {token}: skipped share after each checkpoint {ratios}; first exit: layer {decision.exit_layer}"
        )

    print("one checkpoint after the other, as a forward pass does:")
    state = controller.begin(RISK.shape[1])
    for checkpoint_idx, config in enumerate(CONFIGS):
        levels = controller.step(state, checkpoint_idx, RISK[checkpoint_idx])
        order, at_least = controller.plan(levels)
        print(f"  after layer {config.layer_idx}: levels {levels.tolist()} of 8, {at_least[8]} token(s) whole")
        assert np.array_equal(levels, decisions.levels[checkpoint_idx])
        assert np.array_equal(levels[order], np.sort(levels)[::-1])

    print("thresholds may follow the traffic:")
    before = controller.thresholds[0]
    after = controller.update_threshold(3, np.array([0.4, 0.5, 0.6], dtype=np.float32))
    print(f"  layer 3: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
