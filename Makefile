# MuxTune: `make help` lists what there is. Everything is installed into .venv.
# TORCH_ARGS="--index-url ..." chooses another build of torch; PYTHON chooses the interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo lint type layers unit test test-gpu bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
DEMO_DIR ?= demo_output

# One thread a process: tests run in $(WORKERS) processes and must not depend on the core count.
unit test-gpu: export OMP_NUM_THREADS = 1
unit test-gpu demo bench: export HF_HUB_OFFLINE = 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(INSTALLED): .ci/pins.txt .ci/demo-packages.txt .ci/install pyproject.toml
	PYTHON=$(PYTHON) .ci/install $(VENV)
	@touch $@

install: $(INSTALLED)  ## make .venv with all that tests and demo need

demo: $(INSTALLED)  ## fine-tune five real tasks on this CPU, simulate the same, write a report
	$(BIN)/python -m experiments.demo.run --output $(DEMO_DIR)

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)  ## pyright
	$(BIN)/pyright

layers: $(INSTALLED)  ## import-linter: who may import whom
	$(BIN)/lint-imports

unit: $(INSTALLED)  ## pytest, all but the tests that need a GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder -m "not gpu"

test: lint type layers unit  ## all that needs no GPU: lint, type, layers, unit

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(INSTALLED)  ## benchmarks that run on a CPU; JSON into outputs/bench
	@mkdir -p outputs/bench
	$(BIN)/python experiments/packing_speed/measure.py --output outputs/bench/packing_speed.json
	$(BIN)/python experiments/sim_speed/measure.py --output outputs/bench/sim_speed.json

clean:  ## remove what was built or generated, .venv too
	rm -rf $(VENV) build dist outputs multirun $(DEMO_DIR) *.egg-info .pytest_cache \
		.ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
