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
	@echo "make bench-gpu  on an NVIDIA GPU: build the CUDA kernels, run their tests, measure (GPU_PYTHON=...)"
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

# Peers are optional: where the index has none of them the benchmarks name them as absent.
$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@if $(PIP) $(BUILD) --editable '.[dev,bench]'; then touch $@; else echo "peers are not installed; measured without"; fi

# At most 15 minutes on 2 cores: no case is begun after the budget (seconds) of its benchmark is spent. The benchmarks
# take turns, which spreads each over the whole time (studies/benchmark_stability.md); each piece also runs alone, and
# one that fails does not stop the others. BENCH_RESULTS=FOLDER: the JSON goes there (benchmarks/compare_runs.py says
# how far two runs are apart).
BENCH := $(BIN)/python benchmarks
BENCH_RESULTS ?= benchmarks/results
BENCH_LOGPS := bench_linear_sequence_logps.py --budget 215 --results $(BENCH_RESULTS)
BENCH_ROWS := bench_sequence_logps.py --budget 45 --results $(BENCH_RESULTS)
BENCH_LOSS := bench_napo_loss.py --budget 130 --results $(BENCH_RESULTS)
BENCH_STEP := bench_training_step.py --budget 345 --results $(BENCH_RESULTS)
BENCH_EVALUATION := bench_evaluation.py --budget 90 --results $(BENCH_RESULTS)
BENCH_PREPARE := bench_prepare.py --lines 2000000 --results $(BENCH_RESULTS)
.PHONY: $(addprefix bench-cpu-,logps rows loss step evaluation prepare)
bench: $(VENV)/.installed-bench
	@$(BENCH)/by_turns.py "$(BENCH_LOGPS)" "$(BENCH_ROWS)" "$(BENCH_LOSS)" "$(BENCH_STEP)" "$(BENCH_EVALUATION)" \
	  "$(BENCH_PREPARE)"; failed=$$?; $(BENCH)/render.py && exit $$failed

bench-cpu-logps:
	$(BENCH)/$(BENCH_LOGPS)
bench-cpu-rows:
	$(BENCH)/$(BENCH_ROWS)
bench-cpu-loss:
	$(BENCH)/$(BENCH_LOSS)
bench-cpu-step:
	$(BENCH)/$(BENCH_STEP)
bench-cpu-evaluation:
	$(BENCH)/$(BENCH_EVALUATION)
bench-cpu-prepare:
	$(BENCH)/$(BENCH_PREPARE)

# One NVIDIA GPU, no network: with the Python that has torch already (GPU_PYTHON; .venv's where there is one), built in
# place for the GPU that is there. Each piece also runs alone, and a piece that fails does not stop the others.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_BENCH := $(GPU_PYTHON) benchmarks
GPU_PIECES := $(addprefix bench-gpu-,tests logps rows loss step evaluation)
.PHONY: bench-gpu-build $(GPU_PIECES) bench-render bench-peers
bench-gpu: bench-gpu-build
	@$(MAKE) --no-print-directory -k $(GPU_PIECES); failed=$$?; $(MAKE) --no-print-directory bench-render && exit $$failed

bench-gpu-build:
	@$(GPU_PYTHON) -c "import torch; assert torch.cuda.is_available()" || \
	  (echo "$(GPU_PYTHON) has no torch that sees a GPU; name one that has: make bench-gpu GPU_PYTHON=..." && exit 1)
	PATH="$$PATH:/usr/local/cuda/bin" cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DNAPO_CUDA=ON \
	  -DCMAKE_CUDA_ARCHITECTURES=$$($(GPU_PYTHON) -c "import torch; print('%d%d-real' % torch.cuda.get_device_capability())") \
	  -Dpybind11_DIR=$$($(GPU_PYTHON) -m pybind11 --cmakedir) -DPython_EXECUTABLE=$$(command -v $(GPU_PYTHON))
	cmake --build build/gpu
	cp build/gpu/_C*.so napo_kernels/

bench-gpu-tests:
	timeout 150 $(GPU_PYTHON) -m pytest -m gpu tests
bench-gpu-logps:
	timeout 160 $(GPU_BENCH)/bench_linear_sequence_logps.py --device cuda --budget 90
bench-gpu-rows:
	timeout 90 $(GPU_BENCH)/bench_sequence_logps.py --device cuda --budget 30
bench-gpu-loss:
	timeout 90 $(GPU_BENCH)/bench_napo_loss.py --device cuda --budget 40
bench-gpu-step:
	timeout 150 $(GPU_BENCH)/bench_training_step.py --device cuda --budget 80
bench-gpu-evaluation:
	timeout 60 $(GPU_BENCH)/bench_evaluation.py --device cuda --budget 20
bench-render:
	$(GPU_BENCH)/render.py

# The peers that are pure Python, unpacked into build/peers: they can be carried to a machine without a network, and
# replace nothing there (the folder comes last on the path).
bench-peers:
	$(PYTHON) -m pip --disable-pip-version-check install --quiet --upgrade --no-deps --target build/peers \
	  liger-kernel cut-cross-entropy trl datasets dill multiprocess

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
