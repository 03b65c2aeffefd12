# Two commands to begin with: `make demo` and `make test`. Each makes .venv itself; all they need is Python 3.11-3.13.
.PHONY: help demo test test-full parity curation aot explore lint types docs bench clean
.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first interpreter at hand that is new enough; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PARITY := .venv-parity/bin
export JAX_PLATFORMS ?= cpu

help:
	@echo "make demo       train a small Perception Encoder on handwritten digits and open its report (minutes, CPU)"
	@echo "make test       the tests; no torch, no network"
	@echo "make parity     equality with torch, timm, open_clip, transformers; ARGS='-k word' chooses"
	@echo "make curation   the tests of the Apache Beam program"
	@echo "make aot        compile for TPU slices that are not here; needs no TPU"
	@echo "make explore    the tests of the local web page, driven in a browser where Chromium is installed"
	@echo "make test-full  the long tests too"
	@echo "make bench      speed beside the peers"
	@echo "make lint types docs clean"

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "pe_jax needs Python 3.11, 3.12 or 3.13 on PATH, or PYTHON=/path/to/python"; exit 1; }
	@echo "Making .venv with $(PYTHON) (a minute or two, once) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@# Where CLIP's vocabulary has no wheel of its own, open_clip's package is the carrier; none of its code is used.
	@$(BIN)/python -c "import instant_clip_tokenizer" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --no-deps open_clip_torch
	@touch $@

# torchvision, timm and open_clip come without their dependencies: they would swap a CPU torch for a CUDA one.
.venv-parity/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "pe_jax needs Python 3.11, 3.12 or 3.13 on PATH, or PYTHON=/path/to/python"; exit 1; }
	@echo "Making .venv-parity with torch, timm, open_clip, transformers (a few minutes, once) ..."
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install --quiet --upgrade pip
	$(PARITY)/python -m pip install --quiet "torch==2.13.0"
	$(PARITY)/python -m pip install --quiet --no-deps "torchvision==0.28.0" "timm>=1.0.31" "open_clip_torch>=3.3" \
		"clip-benchmark>=1.6.2" "pycocoevalcap>=1.2"
	@# CLIP_benchmark's accuracy cannot be computed with NumPy 2.4.
	$(PARITY)/python -m pip install --quiet -e ".[convert-test,dev]" "numpy<2.4"
	@touch $@

# Beam holds Pillow and protobuf back, so it lives apart.
.venv-curation/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "pe_jax needs Python 3.11, 3.12 or 3.13 on PATH, or PYTHON=/path/to/python"; exit 1; }
	@echo "Making .venv-curation with Apache Beam (a minute or two, once) ..."
	$(PYTHON) -m venv .venv-curation
	.venv-curation/bin/python -m pip install --quiet --upgrade pip
	.venv-curation/bin/python -m pip install --quiet -e ".[curation,viz]" pytest beartype
	@touch $@

# Gradio holds Pillow back, so the web page's tests live apart.
.venv-explore/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "pe_jax needs Python 3.11, 3.12 or 3.13 on PATH, or PYTHON=/path/to/python"; exit 1; }
	@echo "Making .venv-explore with Gradio (a minute or two, once) ..."
	$(PYTHON) -m venv .venv-explore
	.venv-explore/bin/python -m pip install --quiet --upgrade pip
	.venv-explore/bin/python -m pip install --quiet -e ".[explore]" pytest beartype playwright
	@touch $@

# libtpu compiles for TPUs without one; apart, so that jax elsewhere never looks for a TPU.
.venv-tpu/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "pe_jax needs Python 3.11, 3.12 or 3.13 on PATH, or PYTHON=/path/to/python"; exit 1; }
	@echo "Making .venv-tpu with libtpu (a minute or two, once) ..."
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --upgrade pip
	.venv-tpu/bin/python -m pip install --quiet -e ".[tpu]" pytest pytest-xdist beartype
	@touch $@

demo: .venv/ready
	rm -rf demo
	$(BIN)/pe-jax data digits demo/digits
	$(BIN)/python -m pe_jax.train --config=experiments/digits.py --workdir=demo/run
	$(BIN)/pe-jax report demo/run
	$(BIN)/pe-jax convert demo/run demo/digits.safetensors --to meta
	$(BIN)/pe-jax convert demo/run demo/digits.pt --to meta
	$(BIN)/pe-jax classify --model demo/digits.safetensors $$(ls demo/digits/test/*.png | head -5) \
		--labels "zero,one,two,three,four,five,six,seven,eight,nine" --templates digits --top 2
	@echo "Open demo/run/report/report.html"

test: .venv/ready
	@# Files are handed out in the order of tests/conftest.py.
	$(BIN)/python -m pytest --ignore=tests/parity -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-full: .venv/ready
	$(BIN)/python -m pytest --ignore=tests/parity --full $(ARGS)

parity: .venv-parity/ready
	$(PARITY)/python -m pytest tests/parity -rs -n 2 --dist loadfile $(ARGS)

curation: .venv-curation/ready
	.venv-curation/bin/python -m pytest tests/engine $(ARGS)

explore: .venv-explore/ready
	.venv-explore/bin/python -m pytest tests/test_explore.py --full -rs $(ARGS)

aot: .venv-tpu/ready
	@# The others of tests/tpu need no libtpu: `make test` has them.
	.venv-tpu/bin/python -m pytest tests/tpu/test_aot.py -rs -n 2 $(ARGS)

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/ready
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/ready
	$(BIN)/python -m tests.run_docs

bench: .venv-parity/ready
	$(PARITY)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv .venv-parity .venv-curation .venv-explore .venv-tpu demo runs build *.egg-info
