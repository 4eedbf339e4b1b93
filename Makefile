# The environment that the scripts make, or another: make check VENV=.venv-3.12. (Theirs is PYTHON: what it is made with.)
VENV ?= .venv
python := $(VENV)/bin/python

.PHONY: check docs test test-fast test-gpu bench

check: docs  ## lint, format, types, architecture, the site
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m pytest -q tests/repo/test_architecture.py

docs:  ## the site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

test:  ## everything that runs without a GPU
	./scripts/test.sh

test-fast:
	./scripts/test.sh --fast

test-gpu:
	$(python) -m pytest -m gpu

bench:  ## the loss beside other implementations, on this device
	$(python) benchmarks/loss.py
