# Everything a person types. An activated environment (venv, or conda other than its base) is used
# as it is; otherwise one is made in .venv.
#   make demo | test | check | lock
#   make install [WHEELS=<folder of `make wheels`>]   with WHEELS no package index is asked
#   PYTHON=<interpreter> chooses what .venv is made with

PYTHON ?= python3
WHEELS ?=
SHELL := /bin/bash

ifdef VIRTUAL_ENV
  ENV := $(VIRTUAL_ENV)
else ifneq ($(filter-out base,$(CONDA_DEFAULT_ENV)),)
  ENV := $(CONDA_PREFIX)
else
  ENV := .venv
endif

BIN := $(ENV)/bin
DONE := $(ENV)/.xdimo-installed
INDEX := $(if $(WHEELS),--no-index --find-links $(WHEELS))
CPU_DEMO := $(BIN)/snakemake --configfile config/demo.yaml

.PHONY: install demo test check wheels lock clean

install: $(DONE)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "XDiMo needs Python 3.11 or newer: make PYTHON=<interpreter>")'
	$(PYTHON) -m venv .venv

$(DONE): pyproject.toml constraints.txt | $(BIN)/python
	@test -z '$(WHEELS)' -o -d '$(WHEELS)' || \
	  { echo 'make: WHEELS=$(WHEELS): no such folder; expected one that `make wheels` made' >&2; exit 1; }
	@$(BIN)/python -m pip install $(INDEX) -c constraints.txt -e '.[dev]' || \
	  { echo 'make: step install could not get its packages (about 3 GB) from the package index;' \
	         'without network use: make install WHEELS=<folder made by `make wheels`>' >&2; exit 1; }
	touch $@

demo: install
	$(CPU_DEMO)
	@echo; cat results/demo/summary.md
	@echo; echo "The tables: results/demo/summary.md, results/demo/summary.zh.md"
	@echo "The plots:  $$(ls results/demo/plots/*.png | tr '\n' ' ')"

test: install
	$(BIN)/python -m pytest -n 4 --dist worksteal

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint
	$(BIN)/snakemake --lint --configfile config/demo.yaml

# On a connected machine of the same system and Python; then carry the folder.
wheels: $(BIN)/python
	$(BIN)/python -m pip wheel -c constraints.txt -w wheels '.[dev]' hatchling editables

# Versions of the environment that passed the tests.
lock: install
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

clean:
	rm -rf .venv .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
