# `make demo` and `make test` set everything up by themselves; nothing but Python 3.10 to 3.12 and make is needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Ray's anonymous usage reports are off unless the user turns them on.
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo test test-crash lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/voxflux run demo

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not crash'

# Kills trainers, data workers and nodes, and starts whole runs again: about half an hour on 2 cores; not in CI.
test-crash: $(STAMP)
	$(BIN)/python -m pytest -m crash

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
