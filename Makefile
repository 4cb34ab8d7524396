# `make demo` and `make test` need Python 3.10-3.13 and nothing else: both first make their own environment.

VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.llmc-ready
ORACLES := $(VENV)/.llmc-oracles
# Tiny models are slower with more threads than one; the demo uses every core.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-real check format bench clean real-model

help:  ## Show this text
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name text; do \
	    printf '  make %-10s %s\n' "$$name" "$$text"; done

$(READY): setup.cfg pyproject.toml scripts/setup.sh
	sh scripts/setup.sh $(VENV)
	@touch $@

setup: $(READY)  ## Make the environment in .venv (VENV, PYTHON and TORCH change it: see scripts/setup.sh)

demo: $(READY)  ## Train, convert, quantize, build, evaluate and serve a small model: at most 8 minutes on 2 cores
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) examples/demo.py demo-output

test: $(READY)  ## The tests that need no real model, no GPU and little time
	$(TEST) -m "not slow and not real and not gpu"

$(ORACLES): setup.cfg $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[oracles,ray]"
	@touch $@

test-all: $(READY) $(ORACLES)  ## The slow tests as well
	sh scripts/programs.sh
	$(TEST) -m "not real and not gpu"

test-real: real-model $(READY)  ## The tests on real weights: LLMC_REAL_MODEL=/path/to/model.gguf make test-real
	$(PY) -m pytest -m real

check: $(READY)  ## Lint, format, types, layers and sizes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/unit/test_layers.py
	$(PY) scripts/size_report.py

format: $(READY)  ## Put the code in its format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: real-model $(READY)  ## Time every stage: LLMC_REAL_MODEL=/path/to/model.gguf make bench
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) bench/spine.py "$$LLMC_REAL_MODEL"
	$(PY) bench/convert.py

clean:  ## Remove what the demo and the tools left, but not the environment
	rm -rf demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

real-model:
	@test -f "$$LLMC_REAL_MODEL" || { \
	    echo "LLMC_REAL_MODEL='$$LLMC_REAL_MODEL' is not a file; give the path of a Qwen2.5-Coder-0.5B-Instruct GGUF file:"; \
	    echo "  LLMC_REAL_MODEL=/path/to/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf make $(MAKECMDGOALS)"; exit 2; }
