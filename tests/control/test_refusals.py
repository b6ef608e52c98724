"""What the controllers refuse, in which words, and that a refusal changes nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import sedac_hf.control
from sedac_hf.control import make_controller
from sedac_hf.errors import ConfigError, ControllerError
from sedac_hf.layer_config import LayerConfig
from tests.control.cascades import DESIGN, ENGINES

GOOD = np.zeros(4, np.float32)
UNALIGNED = np.frombuffer(b"\0" * 17, np.uint8)[1:].view(np.float32)
BAD_RISKS = {
    "a list": ([0.0] * 4, "got list"),
    "a tensor": (torch.zeros(4), "got Tensor"),
    "None": (None, "got NoneType"),
    "float64": (GOOD.astype(np.float64), r"got dtype float64; convert it with .astype\('float32'\)"),
    "float16": (GOOD.astype(np.float16), "got dtype float16"),
    "integers": (np.zeros(4, np.int32), "got dtype int32"),
    "big-endian": (GOOD.astype(">f4"), "got dtype >f4"),
    "too long": (np.zeros(5, np.float32), r"got shape \[5\]"),
    "two axes": (np.zeros((1, 4), np.float32), r"got shape \[1, 4\]"),
    "a number": (np.float32(1.0), "got float32"),
    "every second": (np.zeros(8, np.float32)[::2], r"got strides \(8,\); make it contiguous"),
    "backwards": (np.zeros(4, np.float32)[::-1], r"got strides \(-4,\)"),
    "unaligned": (UNALIGNED, "got unaligned memory"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BAD_RISKS)
def test_a_bad_risk_is_refused_and_the_pass_goes_on(engine, name):
    risk, said = BAD_RISKS[name]
    controller = make_controller(DESIGN, controller=engine)
    state = controller.begin(4)
    with pytest.raises(ControllerError, match=r"`risk` must be a C-contiguous float32 array of shape \[4\].*" + said):
        controller.step(state, 0, risk)
    assert state.next_checkpoint == 0
    assert controller.step(state, 0, GOOD).tolist() == [6] * 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_matrix_of_risks(engine):
    controller = make_controller(DESIGN, controller=engine)
    for risk, said in (
        (np.zeros((2, 5), np.float32), r"shape \[3, n\], got shape \[2, 5\]"),
        (np.zeros(3, np.float32), r"got shape \[3\]"),
        (np.zeros((5, 3), np.float32).T, r"got strides \(4, 12\)"),
        (np.zeros((3, 5)), "got dtype float64"),
        ([[0.0]] * 3, "got list"),
    ):
        with pytest.raises(ControllerError, match=said):
            controller.evaluate_batch(risk)


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_steps(engine):
    controller = make_controller(DESIGN, controller=engine)
    state = controller.begin(4)
    for idx in (1, 2, 3, -1):
        with pytest.raises(ControllerError, match=f"must come in order: expected 0 of 3, got {idx}"):
            controller.step(state, idx, GOOD)
    for i in range(3):
        controller.step(state, i, GOOD)
    with pytest.raises(ControllerError, match="this pass has seen all 3 checkpoints"):
        controller.step(state, 3, GOOD)
    twin = make_controller(DESIGN, controller=engine)
    for foreign in (twin.begin(4), None, "state"):
        with pytest.raises(ControllerError, match=r"`state` must come from begin\(\) of this very controller"):
            controller.step(foreign, 0, GOOD)
    for n_tokens in (-1, 1.5, "four", None):
        with pytest.raises(ControllerError, match="`n_tokens` must be an integer of 0 or more"):
            controller.begin(n_tokens)


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_levels(engine):
    controller = make_controller(DESIGN, controller=engine, n_levels=4)
    with pytest.raises(ControllerError, match=r"`levels` must be 0\.\.4, got 7"):
        controller.plan(np.array([1, 7, 5], np.uint8))
    with pytest.raises(ControllerError, match=r"`levels` must be a C-contiguous uint8 array.*got dtype int64"):
        controller.plan(np.array([1, 2]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("layers", "settings", "said"),
    [
        ([], {}, "1 to 255 LayerConfigs, got none"),
        ([LayerConfig(i, 0.2, 0.8, 0.3) for i in range(256)], {}, "1 to 255 LayerConfigs, got 256"),
        ([(3, 0.2, 0.8, 0.3)], {}, r"`layer_configs\[0\]` must be a LayerConfig, got tuple"),
        ([DESIGN[1], DESIGN[0]], {}, r"`layer_configs\[1\].layer_idx` must be above the one before it \(6\), got 3"),
        ([DESIGN[0], DESIGN[0]], {}, r"above the one before it \(3\), got 3"),
        ([LayerConfig(3, 0.2, 1e-9, 0.3)], {}, r"`layer_configs\[0\].initial_threshold` must be finite .* got 1e-09"),
        ([LayerConfig(3, 0.2, 1e39, 0.3)], {}, r"initial_threshold` must be finite in float32"),
        ([LayerConfig(3, 1e39, 0.8, 0.3)], {}, r"target_exit_rate` must be finite in float32, got 1e\+39"),
        ([LayerConfig(3, 0.2, 0.8, 1e7)], {}, r"confidence_weight` must be at most 1e\+06, got 10000000.0"),
        (DESIGN, {"alpha": 1.5}, r"`alpha` must be a number in \[0, 1\], got 1.5"),
        (DESIGN, {"alpha": float("nan")}, "`alpha` must be .* got nan"),
        (DESIGN, {"confidence_decay": -0.1}, r"`confidence_decay` must be a number in \[0, 1\], got -0.1"),
        (DESIGN, {"confidence_decay": "0.9"}, "`confidence_decay` must be .* got '0.9'"),
        (DESIGN, {"n_levels": 1}, r"`n_levels` must be an integer in 2\.\.64, got 1"),
        (DESIGN, {"n_levels": 65}, "got 65"),
        (DESIGN, {"n_levels": 8.0}, r"got 8\.0"),
        (DESIGN, {"soft_exit": "yes"}, "`soft_exit` must be True or False, got 'yes'"),
    ],
)
def test_bad_settings(engine, layers, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_controller(layers, controller=engine, **settings)


def test_an_unknown_engine():
    with pytest.raises(ConfigError, match="`controller` must be 'auto', 'rust' or 'python', got 'cuda'"):
        make_controller(DESIGN, controller="cuda")
    with pytest.raises(AttributeError, match="has no attribute 'Controler'"):
        sedac_hf.control.Controler  # noqa: B018


WITHOUT_THE_COMPILED_MODULE = """
    import logging, sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name == "sedac_hf._rust":
                raise ImportError("blocked for the test")
    sys.meta_path.insert(0, Block())
    logging.basicConfig(format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
    from sedac_hf.layer_config import LayerConfig
    from sedac_hf.control import CascadeController, make_controller
    layers = [LayerConfig(3, 0.2, 0.8, 0.3)]
    first, second = CascadeController(layers), make_controller(layers)
    print(type(first).__name__, type(second).__name__)
    try:
        make_controller(layers, controller="rust")
    except ValueError as error:
        print("refused:", error)
"""


def test_without_the_compiled_module_numpy_takes_over_and_says_so_once():
    code = textwrap.dedent(WITHOUT_THE_COMPILED_MODULE)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    logged, engines, refused = ran.stdout.strip().splitlines()
    assert logged.startswith("sedac_hf.control WARNING sedac_hf._rust is not installed (blocked for the test)")
    assert engines == "PythonController PythonController"
    assert refused.startswith("refused: controller='rust' needs the compiled module")
    assert "pip install ." in refused


def test_the_compiled_module_is_chosen_silently(caplog):
    sedac_hf.control.controller_class.cache_clear()
    with caplog.at_level(logging.INFO):
        assert type(make_controller(DESIGN)).__name__ == "RustController"
    assert caplog.records == []
