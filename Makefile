# Two commands for a newcomer: `make train` and `make test`. Each makes its own environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
LOG := runs/quickstart

.PHONY: train test test-slow lint clean

train: .venv/installed
	$(BIN)/lighthouse fit -c recipes/quickstart.yaml
	@echo
	@echo "Curves and checkpoints: $(LOG)"
	@echo "Look at the curves:     $(BIN)/tensorboard --logdir $(LOG)"

test: .venv/installed-dev lint
	$(BIN)/python -m pytest

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,hf]"
	touch $@

clean:
	rm -rf .venv data runs
