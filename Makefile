# `make demo` trains and evaluates BURN on real images; `make test` runs every test, `make quick` a part in a
# few minutes. All set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo tables test test-arm quick lint fuzz clean

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

# A small table that must come out right, in some minutes: exit code 1 where binary networks are not that much better than
# random ones. Needs Debian's dataset-fashion-mnist.
tables: $(VENV)/.demo
	rm -rf runs/table_gate
	$(BIN)/python tools/make_images.py fashion_mnist data/fashion_mnist
	$(BIN)/python tools/compare.py recipes/tables/gate.yaml --jobs 2

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

# The runtime's NEON path under an emulator. Needs gcc-aarch64-linux-gnu and qemu-user (Debian); skips without.
test-arm: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_runtime.py -k arm

# Without the tests that compile, kill or converge.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo $(VENV)/.dev: setup.cfg setup.py pyproject.toml loaders/turbo.c \
    runtime/core.c runtime/kernels.h runtime/bnn.h
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[$(subst .,,$(suffix $@))]"
	touch $@

# Needs clang with its sanitizer runtime (Debian: clang libclang-rt-dev) and libjpeg62-turbo-dev. Each of the two cores
# gets that long, and the formats of the loaders too.
FUZZ_SECONDS ?= 1800
SANITIZED := clang -g -O1 -std=c11 -D_GNU_SOURCE -ffp-contract=off -fsanitize=fuzzer,address,undefined \
    -fno-sanitize-recover=undefined
fuzz: $(VENV)/.dev
	mkdir -p build/fuzz
	$(SANITIZED) tests/fuzz/turbo_fuzz.c -ljpeg -lm -o build/fuzz/turbo_fuzz
	$(SANITIZED) tests/fuzz/runtime_fuzz.c -o build/fuzz/runtime_fuzz
	$(BIN)/python -m tests.fuzz.make_corpus build/fuzz
	for core in turbo runtime; do \
	    mkdir -p build/fuzz/$${core}_corpus && (cd build/fuzz && ./$${core}_fuzz -max_total_time=$(FUZZ_SECONDS) \
	        -rss_limit_mb=2000 -max_len=65536 $${core}_corpus $${core}_seeds) || exit 1; \
	done
	$(BIN)/python tests/fuzz/fuzz_formats.py $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) runs data build *.egg-info
