# The environment that the scripts make, or another: make check VENV=.venv-3.12. (Theirs is PYTHON: what it is made with.)
VENV ?= .venv
python := $(VENV)/bin/python

.PHONY: check test test-fast test-gpu bench

check:  ## lint, format, types, architecture
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m pytest -q tests/repo/test_architecture.py

test:  ## everything that runs without a GPU
	./scripts/test.sh

test-fast:
	./scripts/test.sh --fast

test-gpu:
	$(python) -m pytest -m gpu

bench:  ## the loss beside other implementations, on this device
	$(python) benchmarks/loss.py
