# The same interpreter as the scripts': .venv, unless PYTHON names another.
PYTHON ?= .venv/bin/python

.PHONY: check test test-fast test-gpu bench

check:  ## lint, format, types, architecture
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_architecture.py

test:  ## everything that runs without a GPU
	./scripts/test.sh

test-fast:
	./scripts/test.sh --fast

test-gpu:
	$(PYTHON) -m pytest -m gpu

bench:  ## the loss beside other implementations, on this device
	$(PYTHON) benchmarks/loss.py
