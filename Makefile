# Two commands for a newcomer: `make train` and `make test`. Each makes its own environment in .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow lint docs clean

train: .venv/installed
	$(BIN)/lighthouse fit -c recipes/quickstart.yaml

# a worker a core, each with one thread: torch's threads would wait for each other; files in their order: the few long
# tests of some would else come last, beside workers that wait
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/installed-dev lint
	$(PYTEST)

test-slow: .venv/installed-dev
	$(PYTEST) -m "slow and not gpu"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages as a site, in site/
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f .ci/mkdocs.yml

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,hf,models]"
# its pins exclude ours, and only its model is tested
	$(BIN)/python -m pip install --quiet --no-deps litgpt
	touch $@

clean:
	rm -rf .venv data runs site
