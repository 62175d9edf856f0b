# make report and make test do all set-up; the other targets build on the same .venv.
PYTHON ?= python3
# First and alone: a CUDA build of PyTorch brings the one Triton that it works with, a CPU
# build brings none and leaves the newest that pyproject.toml allows.
TORCH ?= torch==2.13.0
VERSIONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
# Comparisons of shipped rows: moelab/data/regression_cases.csv says of which.
CASES := two_stages_to_one most_stages_to_one two_stages_to_aware one_stage_to_aware equal_code
# Small sizes: each access takes the sanitizer many times longer.
MEMCHECK ?= pairs or partly_filled or chain or any_distribution or random or test_router
BIN := .venv/bin

.PHONY: report test test-all test-gpu memcheck bench versions check env clean
.DEFAULT_GOAL := report

env: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

report: env
	$(BIN)/moelab report 01_stage_sweep
	$(BIN)/moelab report 02_lds_vs_throughput
	$(BIN)/moelab report 05_kernels_and_peers
	for case in $(CASES); do \
	    $(BIN)/moelab report 06_regression_report -p case $$case --name 06_$$case || exit 1; \
	done

# The interpreter replaces the compiler when kernels are imported, so it needs a run of its own.
test: env
	$(BIN)/python -m pytest -n 2 -m "not slow" --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests/kernels

test-all: env
	$(BIN)/python -m pytest -n 2 --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels
	$(MAKE) versions

# The kernels on the GPU at hand, at full size; then what measures them.
test-gpu: env
	$(BIN)/python -m pytest tests/kernels
	$(BIN)/python -m pytest -m gpu --ignore tests/kernels tests

# Every kernel under CUDA's compute-sanitizer, which stops at a bad access. PyTorch's cache
# would hide reads past a tensor's end.
memcheck: env
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	    --target-processes all $(BIN)/python -m pytest -x tests/kernels -k "$(MEMCHECK)"

bench: env
	$(BIN)/python benchmarks/probe_against_compile.py

# The probe against the full compile, with every Triton that it knows: 20 minutes.
versions: env $(VERSIONS:%=.venv/triton/%)
	for version in $(VERSIONS); do \
	    PYTHONPATH=.venv/triton/$$version $(BIN)/python benchmarks/probe_against_compile.py \
	        --async-copy both || exit 1; \
	done

.venv/triton/%:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version" notebooks/*.ipynb

clean:
	rm -rf .venv rows reports/*.html reports/*.ipynb
