# The newest Python with which JAX runs and that works: a name on PATH may be
# a shim that only prints an error, or lack a part that a virtual environment
# needs.
NEWEST = $(shell for name in python3.13 python3.12 python3.11; do \
	$$name -c 'import ensurepip, ssl, venv' >/dev/null 2>&1 \
	&& echo $$name && break; done)
PYTHON ?= $(or $(NEWEST),$(error no Python works here: install 3.13, 3.12 or \
	3.11 with venv and ssl, or name one with PYTHON=/path/to/python))
BIN := .venv/bin

.PHONY: demo check docs test test-slow test-all clean .venv

demo: .venv
	$(BIN)/python -m ttc_jax.main --config=configs/demo.py

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/mypy

# build/docs/index.html; a warning, as of a link that leads nowhere, is an error.
docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet \
		docs build/docs

test: .venv/dev
	$(BIN)/python -m pytest -m "not slow"

# Kills, fuzz, whole sessions of every method.
test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

# All tests, and which lines of the package none of them ran.
test-all: .venv/dev
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

.venv: .venv/installed

# The stamps are written last, so that an interrupted install is done again.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	@touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet -e '.[dev,docs]'
	@touch $@

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv build/docs .coverage
