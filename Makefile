# Every target does its own set-up: a virtual environment, the pinned packages, the native build. A second call is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*) setup.py pyproject.toml

.PHONY: demo test slow lint format bench codegen gpu clean

demo: $(VENV)/.built
	$(BIN)/gradkernels demo

test: $(VENV)/.built
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/.built
	$(BIN)/python -m pytest -m slow

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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pytest hypothesis expecttest transformers rich matplotlib triton ruff clang-format
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@echo "building the native extension (about a minute)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
