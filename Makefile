# make demo       train the example with plain PyTorch and with selfkd; a table and a picture
# make test       run the tests (in two processes of one thread each; TESTS="-n 0 -k NAMES" for others)
# make test-full  run what that leaves out: whole trainings, large cases, warnings of all that is built
# make bench      time selfkd against eager PyTorch and torch.compile (BENCH="--case 128x100 --json FILE")
# make study      train what the papers claim on digits: half an hour; QUICK=1 for 3; goes on where it was stopped
# make results    write the tables of README.md and docs/ from the reports in bench/results/, and docs/'s pictures
# make gpu-check  run the GPU tests with the Python and PyTorch already here; writes a report (REPORT=FILE;
#                 SANITIZED="-k NAMES" restricts what compute-sanitizer sees)
# make wheel      build an sdist and wheels for x86-64 and AArch64 (manylinux_2_28) twice, compare, test (CUDA=OFF: no
#                 GPU kernels; PROCESSORS=x86_64 for one)
# make hub        lay out a kernel for the Hugging Face Hub in build/hub and test it (HUB_WHEEL=FILE for a wheel that is there)
# make arm        the library for AArch64 in an emulator: C tests, corpus, every case, NumPy (Debian; TESTS="-n 0 -k NAMES")
# make docs       build the documentation in build/docs; a warning is an error
# make compat     run tests under other PyTorch, Python and packages; adds to a table (COMPAT="NAMES"; COMPAT_WHEEL=FILE
#                 for a wheel that is there; each environment takes gigabytes and is deleted when it has passed)
# make sanitize   run the tests over a library with AddressSanitizer and UBSan, the C tests also under valgrind
# make fuzz       look for descriptors that break the C functions (MINUTES=10; needs clang)
# make soak       mixed calls from 8 threads (MINUTES=60): results are right, memory stays flat
# make big        tensors of more than 2^31 elements
# make new        lay out the files of a new row loss (LOSS=name)
# make sass       print registers, instructions and hot loops of an operator's CUDA kernels (OP=name; needs nvcc)
# make lint       check the form of Python and C
# make clean      remove what was built (the environment in .venv stays)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CLANG_FORMAT ?= clang-format==14.0.6
CXX ?= c++
BENCH ?=
QUICK ?=
TESTS ?= -n 2 --dist worksteal
REPORT ?= bench/results/gpu-check.txt
SANITIZED ?=
COMPAT ?= $(TORCH_VERSIONS) $(PYTHON_VERSIONS) torchdistill trl
COMPAT_TABLE ?= bench/results/compat.md
COMPAT_WHEEL ?=
HUB_WHEEL ?=
MINUTES ?=
LOSS ?=
OP ?=
CUDA ?= ON
PROCESSORS ?= x86_64 aarch64
CUDA_ARCHITECTURES ?= 80;90
SHELL := bash
.SHELLFLAGS := -o pipefail -ec
IN := PATH="$(abspath $(VENV))/bin:$$PATH"

SOURCES := $(shell find ops cpu cuda cmake bindings -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
C_FILES := $(shell find ops cpu cuda bindings tests examples -name '*.[ch]' -o -name '*.cu*' -o -name '*.cpp')

.PHONY: help demo test test-full bench study results docs wheel hub sanitize fuzz soak big gpu-check compat new sass lint clean arm needs-python needs-compilers needs-cmocka needs-arm
help:; @sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/selfkd.stamp; $(IN) python examples/sd_dropout.py
# Python may write bytecode: without it each of the processes that tests start compiles PyTorch's sources.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 python -m pytest
test: $(VENV)/tools.stamp | needs-cmocka; $(IN) $(PYTEST) $(TESTS)
test-full: $(VENV)/tools.stamp | needs-cmocka; $(IN) SELFKD_FULL=1 $(PYTEST) -m full $(TESTS)
bench: $(VENV)/selfkd.stamp; $(IN) selfkd bench $(BENCH)
study: $(VENV)/selfkd.stamp; $(IN) PYTHONPATH=examples python -m study $(if $(QUICK),--quick,--report bench/results)
results: $(VENV)/selfkd.stamp; $(IN) python -m selfkd.bench.results && python docs/pictures.py
docs: $(VENV)/tools.stamp; $(IN) python -m sphinx -W --keep-going docs build/docs
sanitize: $(VENV)/tools.stamp | needs-cmocka; $(IN) python tests/sanitize.py
fuzz: $(VENV)/tools.stamp | needs-cmocka; $(IN) python tests/fuzz/campaign.py $(or $(MINUTES),10)
soak: $(VENV)/tools.stamp; $(IN) python tests/soak.py $(or $(MINUTES),60)
big: $(VENV)/tools.stamp; $(IN) SELFKD_BIG=1 python -m pytest -n 0 tests/test_big.py
lint: $(VENV)/tools.stamp
	export $(IN); ruff check && ruff format --check && mypy && clang-format --dry-run -Werror $(C_FILES)
sass: | needs-python; @$(IN) $(PYTHON) tests/sass.py $(OP)
new: | needs-python; $(PYTHON) cmake/new_loss.py $(LOSS)
clean:; rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache $(VENV)/selfkd.stamp

# The environment, step by step; a step is repeated only when something it depends on has changed.
$(VENV)/torch.stamp: | needs-python
	$(PYTHON) -m venv $(VENV)
	$(IN) python -m pip install --no-compile '$(TORCH)'
	touch $@
$(VENV)/selfkd.stamp: $(VENV)/torch.stamp $(SOURCES) | needs-compilers
	$(IN) python -m pip install -v --no-compile '.[examples]'
	touch $@
$(VENV)/tools.stamp: $(VENV)/selfkd.stamp
	$(IN) python -m pip install -q --no-compile 'cmake>=3.24' '$(CLANG_FORMAT)' 'selfkd[test]'
	touch $@

$(VENV)/hub.stamp: $(VENV)/tools.stamp
	$(IN) python -m pip install -q --no-compile 'kernels>=0.17'
	touch $@

needs-python:
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || \
	{ echo 'selfkd needs Python 3.10 or newer with venv (Debian, Ubuntu: apt-get install python3-venv).'; \
	  echo 'For another Python: make ... PYTHON=python3.12'; exit 1; }
needs-compilers:
	@for compiler in $(firstword $(CC)) $(firstword $(CXX)); do command -v $$compiler > /dev/null || \
	{ echo "selfkd needs a C and a C++ compiler, there is no $$compiler (Debian, Ubuntu: apt-get install g++)."; \
	  exit 1; }; done
needs-cmocka:
	@found() { echo '#include <cmocka.h>' | $(CC) -E - > /dev/null 2>&1; }; \
	found || { [ $$(id -u) = 0 ] && apt-get update && apt-get install -y libcmocka-dev; } || true; \
	found || { echo 'The tests need cmocka (Debian, Ubuntu: apt-get install libcmocka-dev).'; exit 1; }

needs-arm:
	@found() { aarch64-linux-gnu-gcc --version && qemu-aarch64 --version; } > /dev/null 2>&1; \
	found || { [ $$(id -u) = 0 ] && apt-get update && apt-get install -y gcc-aarch64-linux-gnu qemu-user; } || true; \
	found || { echo 'AArch64 needs its compiler and an emulator (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user).'; \
	  exit 1; }

# AArch64 in an emulator. Debian's arm64 packages are unpacked and not installed, by an apt with a state of its own, which
# needs no root and leaves the machine as it is; NumPy is a wheel. ctest runs the C programs; then every case of the
# Python tests has its arguments carried to a process of the other processor (tests/remote.py).
ARM := $(CURDIR)/build/arm
ARM_APT = apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false \
  -o Dir::State=$(ARM)/apt -o Dir::State::status=$(ARM)/apt/status -o Dir::Cache=$(ARM)/apt
ARM_PYTHON = qemu-aarch64 -L $(ARM)/root $(ARM)/root/usr/bin/python3
$(ARM)/root.stamp: | needs-arm
	mkdir -p $(ARM)/apt/lists/partial $(ARM)/apt/archives/partial $(ARM)/root && touch $(ARM)/apt/status
	$(ARM_APT) update && $(ARM_APT) install -y --download-only libcmocka-dev libstdc++6 python3
	for package in $(ARM)/apt/archives/*.deb; do dpkg -x $$package $(ARM)/root; done
	touch $@
$(ARM)/numpy.stamp: $(ARM)/root.stamp | $(VENV)/tools.stamp
	version=$$($(ARM_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	$(IN) python -m pip install -q --no-deps --only-binary=:all: --python-version $$version \
	  --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 --upgrade \
	  --target $(ARM)/root/usr/lib/python3/dist-packages numpy
	touch $@
arm: export ASAN_OPTIONS := detect_leaks=0
arm: export OMP_NUM_THREADS := 1
arm: export SELFKD_TEST_REPEATS := 20
arm: $(VENV)/tools.stamp $(ARM)/numpy.stamp
	export $(IN); cmake -S . -B $(ARM) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake -DSELFKD_CUDA=OFF -DSELFKD_WERROR=ON \
	  -DCMOCKA_INCLUDE=$(ARM)/root/usr/include -DCMOCKA_LIBRARY=$(ARM)/root/usr/lib/aarch64-linux-gnu/libcmocka.so
	export $(IN); cmake --build $(ARM) --parallel 2 && ctest --test-dir $(ARM) --parallel 2 --output-on-failure
	export PYTHONPATH=bindings SELFKD_LIBRARY=$(ARM)/libselfkd.so; $(ARM_PYTHON) -m selfkd check && \
	  $(ARM_PYTHON) examples/numpy_ctypes.py $$SELFKD_LIBRARY && \
	  sed -n '/^```python$$/,/^```$$/{/^```/d;p}' docs/numpy.md | $(ARM_PYTHON) > /dev/null
	$(IN) SELFKD_REMOTE="qemu-aarch64 -L /usr/aarch64-linux-gnu $(ARM)/tests/remote" python -m pytest -m remote $(TESTS)

# Nothing is installed or downloaded: Python, PyTorch, CMake and nvcc are those of this machine. compute-sanitizer
# does not run on every machine with a GPU, hence the trial; it sees every allocation when PyTorch keeps none.
GPU_TESTS := $(PYTHON) -m pytest -m cuda -p no:cacheprovider
SANITIZER := compute-sanitizer --error-exitcode 1
gpu-check: export SELFKD_LIBRARY := $(CURDIR)/build/gpu/libselfkd.so
gpu-check: export PYTHONPATH := $(CURDIR)/bindings
gpu-check:
	cmake -S . -B build/gpu -DSELFKD_CUDA=ON -DSELFKD_WERROR=ON -DBUILD_TESTING=OFF
	cmake --build build/gpu --parallel
	mkdir -p $(dir $(REPORT))
	{ date -u +%F; git describe --always --dirty || true; nvidia-smi -L; $(PYTHON) -m selfkd info; $(GPU_TESTS); \
	  if ! $(SANITIZER) $(PYTHON) -c 'import torch; torch.ones(1).cuda()'; then echo 'no compute-sanitizer here'; \
	  else for tool in memcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(GPU_TESTS) $(SANITIZED); done; fi; \
	} 2>&1 | tee $(REPORT)

# An environment is a name in COMPAT: its packages, the tests that it runs, its Python unless that is PYTHON. One wheel
# serves them all. Of the tests of a version some are left out: the C programs, which know neither PyTorch nor
# Python, and CPU variants and long rows, which differ in what the kernels compute.
TORCH_VERSIONS := torch-2.6 torch-2.8 torch-2.10 torch-2.12 torch-newest
PYTHON_VERSIONS := python-3.10 python-3.12 python-3.13
COMPAT_torch-2.6 := torch==2.6.0
COMPAT_torch-2.8 := torch==2.8.0
COMPAT_torch-2.10 := torch==2.10.0
COMPAT_torch-2.12 := torch==2.12.0
COMPAT_torch-newest := torch
COMPAT_python-3.10 := torch==2.12.0
COMPAT_python-3.12 := torch
COMPAT_python-3.13 := torch
COMPAT_PYTHON_python-3.10 := python3.10
COMPAT_PYTHON_python-3.12 := python3.12
COMPAT_PYTHON_python-3.13 := python3.13
COMPAT_torchdistill := torchdistill==1.1.5 timm==1.0.31
COMPAT_NEEDS_torchdistill = $(COMPAT_FILE)[test]
COMPAT_TESTS_torchdistill := tests/test_integrations.py tests/test_integrations_training.py
COMPAT_trl := trl==1.16.0 torch==2.13.0
COMPAT_TESTS_trl := tests/test_integrations_trl.py
COMPAT_FILE = $(or $(COMPAT_WHEEL),$(shell echo build/compat/*.whl))
COMPAT_NEEDS := expecttest hypothesis numpy pytest
COMPAT_TESTS := $(addprefix tests/test_,library.py check.py pytorch.py arguments.py sd_dropout_kl.py distill.py) \
  -k 'not (from_c or v3 or v4 or gpt_classes or many_classes or one_class_stands_out)'
compat: $(COMPAT:%=compat-%)
build/compat/wheel.stamp: $(SOURCES) | needs-python needs-compilers
	$(PYTHON) -m venv build/compat/wheel
	rm -f build/compat/*.whl
	build/compat/wheel/bin/pip wheel -q --no-deps -C cmake.define.SELFKD_CUDA=OFF -w build/compat .
	touch $@
compat-%: $(or $(COMPAT_WHEEL),build/compat/wheel.stamp)
	$(or $(COMPAT_PYTHON_$*),$(PYTHON)) -m venv build/compat/$*
	build/compat/$*/bin/pip install -q $(COMPAT_$*) $(or $(COMPAT_NEEDS_$*),$(COMPAT_NEEDS))
	build/compat/$*/bin/pip install -q --no-deps --force-reinstall $(COMPAT_FILE)
	build/compat/$*/bin/python tests/compat.py $* $(COMPAT_TABLE) $(or $(COMPAT_TESTS_$*),$(COMPAT_TESTS))
	rm -rf build/compat/$*

# The sdist, wheels from it, and all again in other folders: the same bytes. Only the tools are downloaded. The wheel for
# AArch64 has no GPU kernels, and runs in an emulator.
WHEEL := build/wheel/$(if $(filter OFF,$(CUDA)),cpu,cuda)
DIST := dist/$(notdir $(WHEEL))
WHEEL_TOOLS := auditwheel build cmake ninja pytest scikit-build-core twine ziglang==0.17.1
WHEEL_OPTIONS_x86_64 := -C cmake.define.CMAKE_TOOLCHAIN_FILE=cmake/manylinux.cmake \
  -C cmake.define.SELFKD_CUDA=$(CUDA) -C 'cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)'
WHEEL_OPTIONS_aarch64 := -C cmake.define.CMAKE_TOOLCHAIN_FILE=cmake/manylinux-aarch64.cmake -C cmake.define.SELFKD_CUDA=OFF
build/wheel/tools.stamp: Makefile | needs-python needs-compilers
	$(PYTHON) -m venv build/wheel/tools
	build/wheel/tools/bin/pip install -q $(WHEEL_TOOLS)
	touch $@
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
wheel: export PATH := $(CURDIR)/build/wheel/tools/bin:$(PATH)
wheel: export ARM_PYTHON := $(ARM_PYTHON)
wheel: build/wheel/tools.stamp $(if $(filter aarch64,$(PROCESSORS)),$(ARM)/root.stamp)
	rm -rf $(WHEEL) $(DIST) && mkdir -p $(WHEEL) $(DIST)
	for folder in first second; do \
	  python -m build --no-isolation --sdist -o $(WHEEL)/$$folder; \
	  $(foreach processor,$(PROCESSORS),_PYTHON_HOST_PLATFORM=manylinux_2_28-$(processor) pip wheel --no-cache-dir \
	    --no-index --no-build-isolation --no-deps $(WHEEL_OPTIONS_$(processor)) -w $(WHEEL)/$$folder \
	    $(WHEEL)/$$folder/*.gz;) \
	done
	sha256sum $(WHEEL)/*/* && diff -r $(WHEEL)/first $(WHEEL)/second
	cp $(WHEEL)/first/* $(DIST)
	twine check --strict $(DIST)/*
	DIST=$(DIST) python -m pytest --noconftest tests/wheel.py
	ls -l $(DIST)

# A kernel for the Hugging Face Hub: the package of a wheel without CUDA, beside the one that is installed. One to
# publish is made of a wheel of `make wheel CUDA=OFF`, which runs on other machines too.
hub: $(VENV)/hub.stamp $(or $(HUB_WHEEL),build/compat/wheel.stamp)
	rm -rf build/hub
	$(IN) python bindings/hub.py $(or $(HUB_WHEEL),build/compat/*.whl) build/hub
	$(IN) HUB=build/hub OMP_NUM_THREADS=1 python -m pytest -n 0 tests/hub.py
