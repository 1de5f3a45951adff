# Both commands do everything from a bare clone: they make .venv, install the pinned set and run.
#   make demo     quantize the packaged language model to 4 bits and export it
#   make test     lint, types, tests on the installed package, documents, snippets, distribution
PYTHON ?= python3
VENV   ?= .venv
OUTPUT ?= demo_output
JOBS   ?= auto
BIN    := $(VENV)/bin

# The pinned set is of Python 3.11 and later; for 3.10, pip chooses the newest versions that fit.
CONSTRAINTS  := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')
DEPENDENCIES := $(VENV)/.dependencies
PACKAGE      := $(VENV)/.package
SOURCES      := $(shell find aimet_ext -type f -not -name '*.pyc')

.PHONY: demo test install lint types tests docs dist format clean
.DEFAULT_GOAL := test

# One thread: the model is so small that several would mostly wait for each other.
demo: $(PACKAGE)
	OMP_NUM_THREADS=1 $(BIN)/aimet-ext demo --output $(OUTPUT)

test: lint types tests docs dist

install: $(PACKAGE)

# A single resolve: aimet-torch added to an environment with aimet-onnx would leave a broken set.
$(DEPENDENCIES): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS) ".[all]"
	touch $@

# After an edit only the package itself is built and installed again, not its dependencies.
$(PACKAGE): $(DEPENDENCIES) $(SOURCES) README.md
	rm -rf build  # setuptools would pack what an earlier build left there
	$(BIN)/python -m pip install --disable-pip-version-check -q --force-reinstall --no-deps .
	touch $@

lint: $(DEPENDENCIES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEPENDENCIES)
	$(BIN)/mypy

# One thread a worker, for workers with more threads than cores wait for each other.
# Modules go to workers in the order of tests/conftest.py: long ones first.
# AIMET_EXT_TEST_INSTALLED makes tests/conftest.py refuse to run on the checkout.
tests: $(PACKAGE)
	OMP_NUM_THREADS=1 AIMET_EXT_TEST_INSTALLED=1 PYTHONSAFEPATH=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

docs: $(PACKAGE)
	PYTHONSAFEPATH=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# What would be published: built, checked, installed into an environment of its own and run there.
dist: $(DEPENDENCIES)
	OMP_NUM_THREADS=1 $(BIN)/python tests/distribution.py dist

format: $(DEPENDENCIES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist docs/_build $(OUTPUT) .mypy_cache .pytest_cache .ruff_cache
