# Each target makes its virtual environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TASK ?= lr
ARGS ?=
# What gpu-check runs with, and which parts of benchmarks/gpu (all but paper).
GPU_PYTHON ?= $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))
PARTS ?=
# Pairs of Python and PyTorch: the lowest PyTorch, that of `make test`, and the latest.
PAIRS ?= 3.10:2.8.0 3.11:2.13.0 3.12:2.11.0 3.13:2.14.1
# What test-versions runs with. Triton 3.6's interpreter fails with NumPy 2.4 and later.
OTHER_PYTHON ?= $(lastword python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3))
OTHER_VENV ?= .venv-versions
OTHER ?= torch==2.11.0 triton==3.6.0 "numpy<2.4"
OTHER_TESTS ?= tests/kernels $(wildcard tests/ops/test_triton_*.py) $(addprefix tests/, \
	ops/test_backends.py ops/test_graphs.py ops/test_loop_mse.py training/test_trainer_graphs.py \
	benchmarks/test_benchmarks_gpu.py benchmarks/test_compare.py test_collection.py)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
OTHER_READY := $(OTHER_VENV)/.ready

.PHONY: train test bench gpu-check test-versions test-pythons lint dist clean

train: $(READY)  ## train the tiny preset of TASK, ten minutes at most
	$(BIN)/python -m looped_fast.train --task $(TASK) --preset tiny --amp bf16 $(ARGS)

test: $(READY)  ## all tests that need no GPU, with coverage, a file on each core at a time
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		-p no:benchmark --cov --cov-report=term --cov-fail-under=90 $(ARGS)

bench: $(READY)  ## pytest-benchmark suites
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

gpu-check:  ## test and measure on a GPU: with the Python at hand, no installation, no network
	$(GPU_PYTHON) -m benchmarks.gpu $(PARTS) $(ARGS)

test-versions: $(OTHER_READY)  ## kernel tests with the other supported PyTorch and Triton
	$(OTHER_VENV)/bin/python -m pytest -n auto --dist loadfile -p no:cacheprovider \
		$(OTHER_TESTS) $(ARGS)

test-pythons:  ## install, train and test the op with each of PAIRS, in fresh environments
	$(PYTHON) tests/install/versions.py $(PAIRS)

lint: $(READY)  ## style, types, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

dist:  ## sdist and wheels into dist/, each installed in a fresh environment and checked there
	$(PYTHON) tests/install/dist.py "$(TORCH)"

$(READY): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	-$(BIN)/python -m looped_fast.build
	touch $@

# The package runs from the source tree, without its extras, as on a machine with a GPU.
$(OTHER_READY):
	test -x $(OTHER_VENV)/bin/python || $(OTHER_PYTHON) -m venv $(OTHER_VENV)
	$(OTHER_VENV)/bin/pip install --quiet --disable-pip-version-check $(OTHER) safetensors pyyaml \
		tyro tqdm tabulate matplotlib tensorboard setuptools pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(OTHER_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
