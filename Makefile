# Each target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TASK ?= lr
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: train test bench gpu-check lint clean

train: $(READY)  ## train the tiny preset of TASK, ten minutes at most
	$(BIN)/python -m looped_fast.train --task $(TASK) --preset tiny --amp bf16 $(ARGS)

test: $(READY)  ## all tests that need no GPU, with coverage, a file on each core at a time
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile -p no:benchmark \
		--cov --cov-report=term --cov-fail-under=90 $(ARGS)

bench: $(READY)  ## pytest-benchmark suites
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

gpu-check: $(READY)  ## all that needs a GPU: tests, then a comparison, in ten minutes or so
	@$(BIN)/python -c "import torch; raise SystemExit(0 if torch.cuda.is_available() else 2)" || \
		{ echo "gpu-check: PyTorch sees no CUDA device here; run it on a machine with one"; exit 2; }
	TRITON_INTERPRET=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 \
		$(BIN)/python -m pytest -m gpu tests --durations=10 $(ARGS)
	TRITON_INTERPRET=0 $(BIN)/python -m benchmarks.compare --device cuda --cases lr lr_b1 dt \
		--repeats 10 --seconds 2 --timeout 120 --budget 300

lint: $(READY)  ## ruff, and types of the public API
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" numpy "setuptools>=77" wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
