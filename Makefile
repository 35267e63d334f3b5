# PROJECT=<name> narrows every verb to one project; the list of projects is in workspace.toml.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PROJECT  ?=
PYTHON3  ?= python3
PROJECTS := $(or $(PROJECT),$(shell $(PYTHON3) workspace.py projects))
PACKAGES := $(sort shared-utils $(PROJECTS))
EACH     := $(filter-out shared-utils,$(PROJECTS))

help:    ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## */\t/' | expand -t 10
	@echo "built projects: $(shell $(PYTHON3) workspace.py projects)"

setup: .venv/stamp  ## .venv with every built project, from requirements.lock

.venv/stamp: requirements.lock workspace.toml $(wildcard */pyproject.toml)
	test -x .venv/bin/python || $(PYTHON3) -m venv .venv
	test -x .venv/bin/uv || .venv/bin/python -m pip install -q uv
	.venv/bin/uv pip install -q --python .venv/bin/python -r requirements.lock
	.venv/bin/uv pip install -q --python .venv/bin/python --no-deps $(patsubst %,-e ./%,shared-utils $(shell $(PYTHON3) workspace.py projects))
	touch $@

demo: setup  ## run every built project at embedded scale into runs/, then print published | ours | yours
	.venv/bin/python workspace.py demo $(PROJECT)

tables: setup  ## regenerate every RESULTS.md and figure from the committed run logs
	set -e; for name in $(EACH); do $(MAKE) -C $$name tables; done
	.venv/bin/python workspace.py results

test: setup  ## run all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 $(addsuffix /tests,$(if $(PROJECT),$(PROJECT),$(PACKAGES))) $(if $(PROJECT),,tests)

site: setup  ## static results site in site/
	.venv/bin/python -m website.build

bench: setup  ## speed against the peers
	set -e; for name in $(EACH); do $(MAKE) -C $$name bench; done

lint: setup  ## ruff and mypy, check only
	.venv/bin/ruff check .
	.venv/bin/python -m mypy workspace.py */src

clean:   ## remove .venv, site/ and caches; runs/ and results/ stay
	rm -rf .venv site .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo tables test site bench lint clean
