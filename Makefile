# Everything here needs only Python 3.11, pip and a C compiler; `.venv` is built on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast chaos check format bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## Build .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "shoal is tested on Python 3.11 only; say where it is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## Tune, train through a kill -9, register and serve real digits; KEEP=1 leaves it running
	$(BIN)/python -m demo

test: $(STAMP)  ## The whole suite
	$(BIN)/python -m pytest

test-fast: $(STAMP)  ## Without a cluster and without slow tests
	$(BIN)/python -m pytest -m 'not slow and not cluster and not chaos' -q

chaos: $(STAMP)  ## Proof by fault: every worker killed at every step, write and offset (half an hour; SEED=n repeats)
	$(BIN)/python -m pytest -m chaos
	PYTHONPATH=tests $(BIN)/python -m faults $(if $(SEED),--seed $(SEED))

check: $(STAMP)  ## Formatter, linter, type checker, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_direction.py

format: $(STAMP)  ## Let the formatter and linter mend what they can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Ratios against the peers, side by side
	$(BIN)/python -m benchmarks

clean:  ## Remove what the tools leave behind (not .shoal: your runs and models)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info platform/*.egg-info
