PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean .venv

demo: .venv
	$(BIN)/python -m ttc_jax.main --config=configs/demo.py

test: .venv/dev
	$(BIN)/python -m pytest

.venv: .venv/installed

# The stamps are written last, so that an interrupted install is done again.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	@touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
