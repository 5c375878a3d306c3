# `make demo` and `make test` set everything up by themselves; they need make and one of these Pythons with its venv module.
PYTHONS := python3.11 python3.12 python3.10 python3.13
# The first of them that can make a virtual environment; `make PYTHON=... demo` takes another. A name on PATH may be a stub
# (pyenv's), and Debian packages venv apart from Python, so each is tried.
PYTHON ?= $(shell for each in $(PYTHONS); do $$each -c 'import ensurepip, venv' 2>/dev/null && { echo $$each; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Ray's anonymous usage reports are off unless the user turns them on.
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo test test-crash lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
	  echo "expected one of $(PYTHONS) with its venv module, found none; install one:" >&2; \
	  echo "  Debian, Ubuntu: apt install python3-venv    Fedora: dnf install python3.12    macOS: brew install python@3.12" >&2; \
	  echo "or name a Python 3.10 to 3.13 that is elsewhere: make PYTHON=/path/to/python demo" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv $(VENV)
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
