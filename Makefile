# `make` explains the targets. Everything is built below this folder; `make clean` removes it.

VENV ?= .venv
PYTHON ?= python3
# Further arguments of every `pip install`, such as another index.
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
# Without it, `accelerate launch` keeps a CPU run to one thread.
THREADS := $(or $(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN))
RUN := runs/sane-digits
PACKAGES := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run results test test-all benchmarks lint clean

help: ## explain the targets
	@echo "sane-hf: representations of neural network weights"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=python3.12  VENV=.venv  PIP_ARGS=\"--extra-index-url URL\""

run: $(BIN)/.analysis ## install, build the digits zoo, train SANE on it, evaluate, sample, report (7 minutes on 2 cores)
	$(BIN)/python datasets_scripts/digits_cnn.py
	$(BIN)/accelerate launch --num_cpu_threads_per_process $(THREADS) train.py recipes/sane-digits.yaml
	$(BIN)/sane-hf report $(RUN)

results: $(BIN)/.analysis ## repeat the run over three seeds and five splits by model (hours; resumes)
	$(BIN)/python benchmarks/results.py

test: $(BIN)/.dev ## the fast test suite (2 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-all: $(BIN)/.dev ## the fast and the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow"

benchmarks: $(BIN)/.dev ## speed against peers measured in the same run
	for file in $(filter-out benchmarks/results.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

lint: $(BIN)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove everything that was built: environment, zoos, runs, caches
	rm -rf $(VENV) zoos runs sane-resnet build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, in steps that are not repeated: a stamp file stands in it for each finished one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sane-hf needs Python 3.11 or newer, and \`$(PYTHON)\` is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch by itself and first: what follows then finds it installed and brings no other build of it.
$(BIN)/.torch: constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): the first time this takes a few minutes."
	$(PIP_INSTALL) torch
	@touch $@

$(BIN)/.analysis: $(BIN)/.torch $(PACKAGES)
	$(PIP_INSTALL) -e ".[analysis]"
	@touch $@

$(BIN)/.dev: $(BIN)/.torch $(PACKAGES)
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@
