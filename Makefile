# The front door. Everything runs in .venv, which the first target that needs it sets up.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
RUN ?= runs/demo-$(SEED)
# CUDA kernels are built where an NVIDIA device is present; NAPO_CUDA=ON builds them anywhere with nvcc.
NAPO_CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,OFF)

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements/constraints.txt
BUILD := --config-settings=cmake.define.NAPO_CUDA=$(NAPO_CUDA)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') CMakeLists.txt pyproject.toml requirements/constraints.txt

.PHONY: help demo test test-all lint bench bench-gpu wheel docs ext clean
help:
	@echo "make demo       train and evaluate on MovieLens-100K with SmolLM2-135M (SEED=$(SEED), into $(RUN))"
	@echo "make test       the tests that need no GPU (make test-all: the slow ones too)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make bench      the CPU benchmarks, into benchmarks/results/ (leave the machine alone meanwhile)"
	@echo "make bench-gpu  build the CUDA kernels, run the tests that need an NVIDIA GPU, and time the loss on it"
	@echo "make wheel      a wheel with the compiled module, in dist/"
	@echo "make docs       the API's pages from the docstrings, in docs/api/"

# torch goes first: a range asked for by another package must find it there, and not fetch the newest build.
$(VENV)/.installed: $(NATIVE)
	@echo "setting up $(VENV) (torch, transformers and the compiled module)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) $(BUILD) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) $(BUILD) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/napo demo --run $(RUN) --seed $(SEED)

# Two workers with one thread each: the tests are many small ones.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

BENCH := $(BIN)/python benchmarks
STEP := $(BENCH)/bench_training_step.py
bench: $(VENV)/.installed-dev
	$(BENCH)/bench_linear_sequence_logps.py --case small
	$(BENCH)/bench_linear_sequence_logps.py --case large --repeats 3
	$(BENCH)/bench_sequence_logps.py
	$(BENCH)/bench_napo_loss.py
	$(BENCH)/bench_prepare.py
	$(STEP) --name bench_training_step --variants packed answers naive --negatives 8
	$(STEP) --name bench_training_step_one --variants packed answers naive --negatives 1
	$(STEP) --name bench_training_step_negatives --variants packed --negatives 1 4 8 19
	$(STEP) --name bench_training_step_prompts --variants packed --prompts 100 200 500 1000
	$(BENCH)/render.py

bench-gpu: NAPO_CUDA := ON
bench-gpu: $(VENV)/.installed-dev
	$(BIN)/pytest -m gpu tests
	$(BENCH)/bench_napo_loss.py --device cuda

docs: $(VENV)/.installed-dev
	$(PIP) 'pdoc>=16'
	$(BIN)/pdoc --docformat restructuredtext --output-directory docs/api napo_kernels napo

wheel:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist .

# In-place build of the compiled module, for working on it: napo_kernels/_C*.so beside the sources.
ext:
	cmake -S . -B build/ext -G Ninja -DCMAKE_BUILD_TYPE=Release -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DPython_EXECUTABLE=$$(readlink -f $(BIN)/python) $(EXT_FLAGS)
	cmake --build build/ext
	cp build/ext/_C*.so napo_kernels/

clean:
	rm -rf build dist $(VENV) napo_kernels/_C*.so
