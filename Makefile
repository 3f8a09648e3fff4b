PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv
	$(BIN)/python -m ttc_jax.main --config=configs/demo.py

test: .venv/dev
	$(BIN)/python -m pytest

.venv: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	@touch .venv

.venv/dev: .venv
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch .venv/dev

clean:
	rm -rf .venv
