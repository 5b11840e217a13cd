# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the others.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# each worker begins with a stretch of its own, so that what a file prepares is prepared once
PARALLEL := -n $(WORKERS) --dist worksteal
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check static docs pages notebooks gallery matrix coverage clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.installed  ## install, explode a 110-layer network, draw where
	$(BIN)/resdiag run --variant elu_pre --depth 110 --data digits --runs demo/runs
	@$(BIN)/resdiag plot gradnorms --runs demo/runs --out demo/gradnorms --format png,svg > /dev/null
	@echo
	@echo "the run:  demo/runs      again, in words:  $(BIN)/resdiag explain --runs demo/runs"
	@echo "the plot: demo/gradnorms.png and demo/gradnorms.svg"

test: $(VENV)/.installed-dev  ## install, then everything that CI runs
	@$(MAKE) --no-print-directory static docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) --durations=20

check: static  ## the fast part: style, types, doors, documentation tests; installs nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/project/test_docs.py

static:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs:  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python docs/generate.py --check
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

pages:  ## write the generated reference pages again
	$(BIN)/python docs/generate.py

gallery: $(VENV)/.installed-dev  ## train the runs of the gallery and draw its pictures again
	OMP_NUM_THREADS=1 $(BIN)/python docs/gallery.py

notebooks: $(VENV)/.installed-dev  ## run the notebooks of the documentation again
	$(BIN)/python docs/notebooks/execute.py

matrix: $(VENV)/.installed-dev  ## the tests on the oldest and newest Python and PyTorch: noxfile.py
	$(BIN)/python -m nox

coverage: $(VENV)/.installed-dev  ## which share of the package the tests run; lines in build/coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) \
		--cov --cov-report=term --cov-report=html:build/coverage

clean:  ## remove the environment and everything that was built or drawn
	rm -rf $(VENV) demo build dist docs/_build .coverage .nox .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamps below: an installation takes minutes, so it is repeated only if pyproject.toml changed.
# It is editable, so that neither command ever runs an old copy of the code.

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.made:
	$(if $(filter yes,$(shell $(RECENT) 2>/dev/null)),,$(error $(TOO_OLD)))
	@echo "installing into $(VENV) (PyTorch is large: a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

RECENT = $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "no")'
FOUND = $(or $(shell $(PYTHON) --version 2>&1 | grep '^Python [0-9]'),not there)
TOO_OLD = resdiag needs Python 3.11 or newer, and $(PYTHON) is $(FOUND): \
	try make $(MAKECMDGOALS) PYTHON=python3.11
