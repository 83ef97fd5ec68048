# `make run` and `make test` do all the set-up on a machine with Python >= 3.11, pip, make and a C library.

PYTHON ?= python3
BIN = .venv/bin
SGLANG_BIN = .venv-sglang/bin
export OMP_NUM_THREADS ?= 1
# Modules are compiled when they are first imported, a fraction of all that pip would compile. Some hundred processes
# of the tests import them, so they are kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

.PHONY: run test ablation test-sglang lint docs clean

run: .venv/installed
	$(BIN)/python launch/run.py $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest $(ARGS)

# What staleness costs, preset by preset; stopped, it goes on where it was (docs/staleness.md).
ablation: .venv/installed-test
	$(BIN)/python bench/staleness/ablation.py $(ARGS)

# Real SGLang on a CPU, in an environment of its own (2.6 GB): the engine's contract, without a GPU.
test-sglang: .venv-sglang/installed
	SGLANG_USE_CPU_ENGINE=1 PYTHONPATH=$(CURDIR)/tests/sglang/shims $(SGLANG_BIN)/python -m pytest tests/sglang $(ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -c 'from asyncrl.monitor import metrics; print(metrics.page(), end="")' > docs/metrics.md

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

.venv-sglang/installed: tests/sglang/requirements.txt tests/sglang/requirements-no-deps.txt
	$(PYTHON) -m venv .venv-sglang
	$(SGLANG_BIN)/python -m pip install --quiet --no-compile -r tests/sglang/requirements.txt
	$(SGLANG_BIN)/python -m pip install --quiet --no-compile --no-deps -r tests/sglang/requirements-no-deps.txt
	$(SGLANG_BIN)/python -m pip install --quiet --no-compile --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-sglang
