# `make demo` trains and evaluates BURN on real images; `make test` runs every test, `make quick` a part in a
# few minutes. All set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick lint fuzz clean

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

# Without the tests that compile, kill or converge.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo $(VENV)/.dev: setup.cfg setup.py pyproject.toml loaders/turbo.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[$(subst .,,$(suffix $@))]"
	touch $@

# Needs clang with its sanitizer runtime (Debian: clang libclang-rt-dev) and libjpeg62-turbo-dev.
FUZZ_SECONDS ?= 1800
fuzz: $(VENV)/.dev
	mkdir -p build/fuzz
	clang -g -O1 -std=c11 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	    tests/fuzz/turbo_fuzz.c -ljpeg -lm -o build/fuzz/turbo_fuzz
	$(BIN)/python tests/fuzz/make_corpus.py build/fuzz/seeds
	mkdir -p build/fuzz/corpus
	cd build/fuzz && ./turbo_fuzz -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2000 -max_len=65536 corpus seeds
	$(BIN)/python tests/fuzz/fuzz_formats.py $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) runs data build *.egg-info
