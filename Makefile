# One environment for everything, made once and remade when what it is made from changes.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# Processes that share the tests out.
WORKERS ?= 2

# What runs a second time as plain Python: kernels whose loops are quick enough that way.
PLAIN := $(addprefix tests/unit/test_,rotation.py permutation.py second_order.py calibration.py \
	merging.py diagnostics.py) $(addprefix tests/property/test_,rotation.py permutation.py \
	diagnostics.py)

.PHONY: demo test test-arm lint bench clean

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[transformers]"
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[transformers,dev,peers]"
	touch $@

demo: $(VENV)/.runtime
	rm -rf demo-output
	$(BIN)/corequant demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/mypy tests/unit/test_typed.py
	$(BIN)/lint-imports
	$(BIN)/python tests/structure.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -q $(PLAIN)

# Emulated, with an environment of its own in the user's cache folder: hours.
test-arm: $(VENV)/.dev
	$(BIN)/python tests/arm.py -n $(WORKERS) --dist worksteal

bench: $(VENV)/.dev
	$(BIN)/python -W ignore bench/bench_rotation.py --rounds 5 --write
	$(BIN)/python -W ignore bench/bench_formats.py --peers --write
	$(BIN)/python bench/bench_massdiff.py
	$(BIN)/python -W ignore bench/bench_torch.py --write

clean:
	rm -rf $(VENV) build dist demo-output
