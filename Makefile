# Every target does its own set-up: a virtual environment, the pinned packages, the native build. A second call is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*) setup.py pyproject.toml

FUZZ_SECONDS ?= 3600
OPS := gelu layer_norm add_layer_norm residual probe lstm_layer lstm_cell
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1
# Exit code 99, so that the fuzzer tells a process that a sanitizer ended from one that found something wrong. Python leaks.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" PYTHONPATH=$(CURDIR)/build/asan/lib \
	ASAN_OPTIONS=detect_leaks=0:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1:exitcode=99

.PHONY: demo test slow fuzz asan lint format bench codegen gpu clean

demo: $(VENV)/.built
	$(BIN)/gradkernels demo

# In as many processes as there are CPU cores; a test that is about threads starts its own.
test: $(VENV)/.built
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

slow: $(VENV)/.built
	$(BIN)/python -m pytest -m slow

# Random examples on every instruction set this CPU has, all at the same time: FUZZ_SECONDS=60 for a minute of it.
fuzz: $(VENV)/.built
	cd tests && $(abspath $(BIN))/python -m fuzz --seconds $(FUZZ_SECONDS)

# The extension once more, in build/asan, with AddressSanitizer and UBSan: the op tests and a minute of fuzzing on it. About
# seven minutes on two cores, four of them the build.
asan: $(VENV)/.installed
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	cd tests && $(SANITIZED) $(abspath $(BIN))/python -m pytest -p no:cacheprovider -m "not slow" -k "not inductor" $$(find . -name "test_every_op*.py" $(OPS:%=-o -name test_%.py))
	cd tests && $(SANITIZED) $(abspath $(BIN))/python -m fuzz --seconds 60

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' | grep -v tables)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' | grep -v tables)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.table --write

codegen: $(VENV)/.built
	$(BIN)/python -m benchmarks.codegen
	$(BIN)/python -m benchmarks.cuda_codegen

# On a machine with a GPU, with the torch and triton that are installed there: nothing is downloaded.
gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf build *.egg-info gradkernels/_C*.so $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy setuptools pybind11 ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pytest pytest-xdist hypothesis expecttest transformers rich matplotlib triton ruff clang-format
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@echo "building the native extension (about a minute)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
