# Everything runs in one virtual environment, .venv, made on first use and again when its pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: help setup demo test test-compiles test-all lint docs bench gpu dist clean

help:
	@echo "make demo      draw emoji from words; train on real digits, sample them; pictures in out/"
	@echo "make test      the test suite (no GPU needed)"
	@echo "make test-compiles  what compiles kernels for GPUs (no GPU needed)"
	@echo "make test-all  all of these and the slow tests"
	@echo "make lint      ruff, mypy and clang-format"
	@echo "make bench     the benchmarks: each op, then whole models"
	@echo "make gpu       all tests and benchmarks that need a GPU, into benchmarks/results/"
	@echo "make docs      the documentation site, into build/docs"
	@echo "make dist      sdist and wheel, into dist/"

setup: $(STAMP)

# The stamp is written last: an interrupted installation is simply done again.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "== setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $(STAMP)

demo: setup
	@echo "== drawing emoji, then training on digits and sampling them: pictures go to out/"
	$(BIN)/python examples/draw.py --out out
	$(BIN)/python examples/digits.py --out out

# A process for each core; files stay whole, since many share what they build.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: setup
	@echo "== tests"
	$(PYTEST) -m "not slow and not compiles"

test-compiles: setup
	@echo "== tests that compile kernels for GPUs"
	$(PYTEST) --dist worksteal -m "compiles and not slow"

test-all: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/csrc \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) \
	  -exec $(BIN)/clang-format --dry-run --Werror {} +

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only
	$(BIN)/diffusion-fast bench

gpu: setup
	$(BIN)/python -m benchmarks.gpu

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "== to read it with its search: $(BIN)/python -m http.server --directory build/docs"

dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache
