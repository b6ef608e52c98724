"""The house: import layers, what an import loads, docstrings of the public names, packaged files."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sedac_hf
from sedac_hf.assets import demo_path, load_demo
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after the statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_layers_hold() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_light() -> None:
    loaded = modules_after("import sedac_hf")
    heavy = {"triton", "vllm", "transformers.modeling_utils", "sedac_hf.modeling", "datasets", "matplotlib"}
    assert loaded & heavy == set()


@pytest.mark.parametrize(
    "imports",
    [
        "import sedac_hf; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import sedac_hf",
        "import sedac_hf.configuration; from transformers import AutoConfig, AutoModelForCausalLM",
        "import sedac_hf.calibration; from transformers import AutoConfig, AutoModelForCausalLM",
        "import sedac_hf.modeling; from transformers import AutoConfig, AutoModelForCausalLM",
    ],
    ids=["before", "after", "configuration", "calibration", "modeling"],
)
def test_importing_the_package_registers_the_auto_classes(imports: str, tmp_path: Path) -> None:
    model = sedac_hf.SedacForCausalLM.from_base(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    script = (
        f"{imports}\n"
        f"print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["SedacConfig", "SedacForCausalLM"], done.stderr


@pytest.mark.parametrize("module", ["sedac_hf.cli.main", "sedac_hf.assets"])
def test_what_every_command_imports_is_light(module: str) -> None:
    assert modules_after(f"import {module}") & {"torch", "transformers", "datasets", "matplotlib"} == set()


def test_public_names_are_documented() -> None:
    assert sedac_hf.__all__, "the package must name what is public"
    undocumented = [
        name
        for name in sedac_hf.__all__
        if (inspect.isclass(value := getattr(sedac_hf, name)) or callable(value)) and not (value.__doc__ or "").strip()
    ]
    assert undocumented == []


def test_public_methods_of_the_wrapper_are_documented() -> None:
    from transformers import PreTrainedModel

    wrapper = sedac_hf.SedacForCausalLM
    own = {name: value for name, value in vars(wrapper).items() if not name.startswith("_") and callable(value)}
    assert {"calibrate", "stats", "save_pretrained", "disable", "full_width", "unload"} <= own.keys()
    foreign = {name for name in own if hasattr(PreTrainedModel, name)}  # transformers' interface, explained there
    assert [name for name in own.keys() - foreign if not inspect.getdoc(own[name])] == []


def test_every_module_says_what_it_is() -> None:
    silent = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        if "import triton" in path.read_text(encoding="utf-8") and find_spec("triton") is None:
            continue  # loaded on demand only, by ops/library.py
        if not (importlib.import_module(name).__doc__ or "").strip():
            silent.append(name)
    assert silent == []


def test_embedded_decoder_loads_in_the_asked_type() -> None:
    import torch

    assert demo_path().is_dir()
    model, tokenizer = load_demo(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    text = "import os\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_embedded_decoder_predicts_python() -> None:
    import torch

    model, tokenizer = load_demo()
    ids = tokenizer("for i in range(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss < 0.6 * torch.log(torch.tensor(float(len(tokenizer))))  # far better than guessing


def test_version_is_the_same_everywhere() -> None:
    for manifest in ("pyproject.toml", "rust/Cargo.toml"):
        text = (ROOT / manifest).read_text(encoding="utf-8")
        assert re.findall(r'^version = "(.*)"', text, re.MULTILINE) == [sedac_hf.__version__], manifest
    assert f"## [{sedac_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_explains_itself() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert targets == set(re.findall(r"^  make ([a-z-]+)", done.stdout, re.MULTILINE))
