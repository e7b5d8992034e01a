# Each goal does all its own set-up: nothing is assumed but Python 3.11 or newer, and make.
.PHONY: quickstart test lint clean
.DEFAULT_GOAL := quickstart

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin

# Installs, replays scenarios/quickstart.yaml against the built-in server on an emulated GPU, and names the report.
quickstart: .venv/installed
	$(BIN)/gpuplan bench scenarios/quickstart.yaml --out reports/quickstart

# Lint, types, import contracts and all tests.
test: .venv/installed-dev lint
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check gpuplan tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "gpuplan needs Python 3.11 or newer with the venv module"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .hypothesis
