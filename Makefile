# Two commands do everything on a machine with Python and Rust: `make demo` and `make test`. `make help` lists the rest.

# The interpreter that .venv is made from: 3.10 or newer.
PYTHON ?= python3
# Handed to pip (another index, a PyTorch build without CUDA), to pytest (-k recipes), to `sedac-hf demo`.
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?=

SHELL := /bin/bash
VENV := .venv
OLDEST := .venv-oldest
ABOUT_MODELS := tests/families tests/ffn tests/running tests/saving tests/test_modeling.py tests/test_invariants.py
BIN := $(VENV)/bin
CARGO := cargo
MANIFEST := --manifest-path rust/Cargo.toml
RUST_SOURCES := $(shell find rust -path '*/target' -prune -o \( -name '*.rs' -o -name 'Cargo.*' \) -print 2>/dev/null)

# cargo is found right after its installation too, before a new shell has read the profile.
export PATH := $(PATH):$(HOME)/.cargo/bin
# pyo3's build reads its interpreter from here.
export PYO3_PYTHON := $(abspath $(BIN)/python)
# Small models: more threads cost more than they give. Fast tokenizers warn about forks otherwise.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint lint-rust lint-python test-rust test-python test-oldest format models wheel clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Make .venv, build the Rust module and install everything (both commands below do it)

demo: setup ## Run the main job on the embedded decoder: calibrate, compare, plot, complete a function
	$(BIN)/sedac-hf demo $(DEMO_FLAGS)

test: lint-rust test-rust lint-python test-python ## Run every check: formats, lints, types, layers, and all tests

lint: lint-rust lint-python ## Run the checks that need no test run

lint-rust: setup ## Check format and lints of the Rust crates
	$(CARGO) fmt $(MANIFEST) --all -- --check
	$(CARGO) clippy $(MANIFEST) --locked --workspace --all-targets -- -D warnings

lint-python: setup ## Check format, lints, types and import layers of the Python code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .import_linter_cache

# sedac-py is left out: a test program of it would need Python's library to link with, which few machines have. What it
# does is tested from Python.
test-rust: setup ## Run the Rust tests
	$(CARGO) test $(MANIFEST) --locked --workspace --exclude sedac-py

test-python: setup ## Run the Python tests, with the snippets of the README and the examples
	$(BIN)/pytest $(PYTEST_FLAGS)

# The second environment holds what differs from .venv, and takes the rest from there.
test-oldest: setup ## Run the tests of models with the oldest transformers that is supported
	$(BIN)/python -m venv --clear $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_base.pth
	$(OLDEST)/bin/python -m pip install -q $(PIP_FLAGS) \
	  "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).*"
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider $(PYTEST_FLAGS) $(ABOUT_MODELS)

format: setup ## Rewrite the sources in the project's format
	$(CARGO) fmt $(MANIFEST) --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: setup ## List anew how each model type is cut (src/sedac_hf/assets/models.json, docs/models.md)
	$(BIN)/python -m tests.families.supported

wheel: setup ## Build a wheel into dist/
	$(BIN)/maturin build --release --out dist

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) $(OLDEST) rust/target dist build src/sedac_hf/_rust*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Set-up, in two steps that are each done once: the stamps say when.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: Python 3.10 or newer is needed and $(PYTHON) was not found: install it," \
	    "or name another one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed and $(PYTHON) is $$($(PYTHON) --version 2>&1): install a newer one," \
	    "or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module with pip: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(RUST_SOURCES)
	@command -v $(CARGO) >/dev/null || { \
	  echo "make: Rust is needed and cargo was not found: install it with rustup (rustup.rs)"; exit 1; }
	@need=$$(sed -n 's/^rust-version *= *"\(.*\)".*/\1/p' rust/Cargo.toml); have=$$($(CARGO) --version | cut -d' ' -f2); \
	  [[ "$$(printf '%s\n' "$${need:-0}" "$$have" | sort -V | head -n 1)" == "$${need:-0}" ]] || { \
	  echo "make: Rust $$need or newer is needed and cargo is $$have: rustup update, or install it with rustup"; exit 1; }
	@command -v cc >/dev/null || { \
	  echo "make: Rust needs a C linker and cc was not found: on Debian and Ubuntu, apt install build-essential"; exit 1; }
	@echo "Installing into $(VENV). The first time, PyTorch and its CUDA libraries are several GB: allow a few minutes."
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_FLAGS) --editable '.[dev]'
	@touch $@
