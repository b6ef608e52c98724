"""The best constant level: one operating point per FFN for all tokens, no probes; the law must not be worse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sedac_hf.calibration.dial import Dial
from sedac_hf.runtime import SedacRuntime


@contextmanager
def prepared(runtime: SedacRuntime, dial: Dial) -> Iterator[None]:
    """Channel order or shadows of a dial in place, no policy; the runtime must be bare, and is bare afterwards."""
    runtime.weights.reorder(dial.channel_order)
    try:
        if dial.cut == "select":
            runtime.build_shadows()
        yield
    finally:
        runtime.uninstall()


@contextmanager
def at_constant_level(runtime: SedacRuntime, dial: Dial, share: float) -> Iterator[None]:
    """Run at the dial's constant operating points for a needed share, within `prepared`."""
    points, compensation, _ = dial.constant(share)
    with runtime.forced(points, compensation):
        yield
