# `make run` and `make test` do all the set-up on a machine with Python >= 3.11, pip, make and a C library.

PYTHON ?= python3
BIN = .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: run test lint docs clean

run: .venv/installed
	$(BIN)/python launch/run.py $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -c 'from asyncrl import metrics; print(metrics.page(), end="")' > docs/metrics.md

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv
