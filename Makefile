# `make demo` trains and evaluates BURN on real images; `make test` runs every test. Both set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo $(VENV)/.dev: setup.cfg setup.py pyproject.toml loaders/turbo.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[$(subst .,,$(suffix $@))]"
	touch $@

clean:
	rm -rf $(VENV) runs data build *.egg-info
