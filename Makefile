# The two commands a new user needs: `make up` and `make test`.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PIP_FLAGS ?=
# Four workers on any machine: on two cores half of them wait, for an engine, a deadline or a watchdog. Tests that share
# an engine or a file stay in one. Longest first, as tests/conftest.py says.
PARALLEL ?= -n 4 --dist loadgroup --no-loadscope-reorder --durations 15

.DEFAULT_GOAL := help
.PHONY: help up test fast docs venv lock clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: $(VENV)/.launcher  ## from nothing to a served demo endpoint on the real SGLang, until Ctrl-C
	$(BIN)/qwen3emb up --profile demo

test: venv  ## everything: lint, types, unit tests, real-engine tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/qwen3emb engine install cpu
	$(BIN)/python -m pytest $(PARALLEL)

fast: venv  ## lint, types and the tests that need no engine
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python -m pytest $(PARALLEL) -m "not engine"

docs: venv  ## write the generated pages again (CLI reference, profile schema)
	$(BIN)/python docs/generate.py

venv: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --upgrade "pip>=25.1"

$(VENV)/.launcher: pyproject.toml requirements/launcher.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -q -c requirements/launcher.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml requirements/dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -q -r requirements/dev.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -q --no-deps -e .
	@touch $@ $(VENV)/.launcher

clean:  ## remove the virtual environment and caches (the engine environment stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

lock: | $(VENV)/bin/python  ## pin requirements/ again from pyproject.toml
	$(BIN)/python -m pip install -q --upgrade -e . --group dev
	{ echo '# What `make test` installs, pinned by `make lock`.'; $(BIN)/python -m pip freeze --exclude-editable; } > requirements/dev.txt
