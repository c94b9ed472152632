# From a bare machine with Python 3.11+ and a C++ compiler to a result:
#   make train     environment, dependencies, host library, then: python train.py --model m1 --fused
#   make test      environment, dependencies, host library, then the whole test suite
#   make sanitize  every kernel on every shape, on the CPU under ThreadSanitizer, AddressSanitizer and UBSan
#   make mutate    plants small faults in the kernels, which tests must notice (three quarters of an hour)
#   make torture   kills runs with kill -9 at random moments and resumes them, tries bad input and fuzzes the readers
#                  (about ten minutes); writes README.md's table, or OUT=folder
#   make bench     measures kernels, steps and epochs (9 minutes), draws the plots and writes README.md's tables
#   make study     every model with three seeds and what each refinement is worth (half an hour): report in OUT;
#                  DATA=emnist studies EMNIST, ALSO="folder ..." further data sets
#   make gpu-check every kernel on this GPU and under compute-sanitizer; installs nothing; OUT=folder of the report
#   make gpu-report  the measurements on this GPU and under Nsight; installs nothing; OUT=folder of the results
# Others: make build | clean; make cuda compiles the GPU kernels ahead of time (needs nvcc), make budget prints
# the registers and memory that they use.  ARGS="..." goes to train.py, pytest, the benchmark or the check.
#   make CUPY=cupy-cuda13x ...   uses CuPy for CUDA 13;   make CUPY= ...   goes without CuPy

PYTHON ?= python3
VENV ?= .venv
CUPY ?= $(if $(filter Darwin,$(shell uname -s)),,cupy-cuda12x)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(or $(CUPY),without-cupy)
DATA ?= glyphs:30000
TO = $(if $(OUT),--out "$(OUT)")
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
LIBRARY := kernels/libkernels_host.so
CONFIGURE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release
SOURCES := CMakeLists.txt $(wildcard kernels/src/*.* kernels/src/host/*.*)

.PHONY: train test study sanitize mutate torture gpu-check bench gpu-report build cuda budget clean
.DELETE_ON_ERROR:

train: build
	$(BIN)/python train.py --model m1 --fused $(ARGS)

# A file per process, and in each process one thread for matrix products: threads that wait for each other do not get
# on where other processes have the cores.
test: build
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile $(ARGS)

study: build
	$(BIN)/python -m mlp study --data "$(DATA)" $(if $(ALSO),--also $(ALSO)) $(TO) $(ARGS)

bench: build
	$(BIN)/python profile/bench_kernels.py $(TO)
	$(BIN)/python profile/bench_step.py $(TO)
	$(BIN)/python profile/ladder.py $(TO)
	$(BIN)/python profile/report.py $(if $(OUT),"$(OUT)")

# At most nine minutes. Whatever fails or is cut short, its results so far stay, and the rest is measured.
gpu-report:
	status=0; run() { limit=$$1; shift; timeout --foreground $$limit $(GPU_PYTHON) "$$@" || status=1; }; \
	run 170 profile/bench_kernels.py --device cuda $(TO); run 180 profile/bench_step.py --device cuda $(TO); \
	run 70 profile/ladder.py --device cuda $(TO); run 50 profile/nsight.py ncu $(TO); run 50 profile/nsight.py nsys $(TO); \
	run 20 profile/report.py $(if $(OUT),"$(OUT)"); exit $$status

sanitize: build
	$(BIN)/python -m pytest tests/test_sanitizers.py tests/test_host_sanitizers.py --every-case $(ARGS)

mutate: build
	$(BIN)/python -m tests.mutations $(ARGS)

torture: build
	$(INSTALL) atheris
	$(BIN)/python -m tests.torture $(TO) $(ARGS)
	$(if $(OUT),,$(BIN)/python profile/report.py)

gpu-check:
	$(GPU_PYTHON) -m tests.gpu_check $(TO) $(ARGS)

build: $(LIBRARY)

cuda: $(INSTALLED)
	$(CONFIGURE) -B build/cuda -DMLP_CUDA=ON
	$(BIN)/cmake --build build/cuda --target kernels_cuda

budget: $(INSTALLED)
	$(BIN)/python -m tests.resources

# The dependencies of pyproject.toml in the versions of constraints.txt, with the CuPy that was asked for; the project
# itself runs from this folder.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/installed-*
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  e = p["optional-dependencies"]; d = [x for x in p["dependencies"] if not x.startswith("cupy")]; \
	  print("\n".join(d + e["test"] + e["build"] + "$(CUPY)".split()))' > $(VENV)/requirements.txt
	$(INSTALL) --requirement $(VENV)/requirements.txt
	@touch $@

$(LIBRARY): $(INSTALLED) $(SOURCES)
	@mkdir -p build
	@$(CONFIGURE) -B build/host > build/configure.log || { cat build/configure.log; exit 1; }
	$(BIN)/cmake --build build/host
	@touch $@

clean:
	rm -rf build $(LIBRARY) kernels/module.fatbin* $(VENV)
