# PROJECT=<name> limits demo, test, tables, rehearse, bench, record, drill, mutants and alone to one project.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PROJECT  ?=
PYTHON3  ?= python3
PROJECTS := $(or $(PROJECT),$(shell $(PYTHON3) tools/workspace.py projects))
PACKAGES := $(sort shared-utils $(PROJECTS))
ifeq ($(PROJECTS),)
ifneq ($(filter-out help doctor clean,$(or $(MAKECMDGOALS),help)),)
$(error "$(PYTHON3) tools/workspace.py" found no project: it needs Python 3.11 or newer, see `make doctor`)
endif
endif
LOCAL    := $(patsubst %,-e ./%,shared-utils $(shell $(PYTHON3) tools/workspace.py projects))
EACH     := $(filter-out shared-utils,$(PROJECTS))

help:    ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## */\t/' | expand -t 10
	@echo "built projects: $(shell $(PYTHON3) tools/workspace.py projects)"

setup: .venv/stamp  ## .venv with every built project, from requirements.lock

.venv/stamp: requirements.lock workspace.toml $(wildcard */pyproject.toml)
	test -x .venv/bin/python || $(PYTHON3) -m venv .venv
ifdef WHEELS
	$(PYTHON3) -c "import site; print(*site.getsitepackages(), sep='\n')" > $$(echo .venv/lib/python*/site-packages)/machine.pth
	.venv/bin/python -m pip install -q --no-index --no-deps $(WHEELS)/*.whl
	.venv/bin/python -m pip install -q --no-index --no-deps --no-build-isolation $(LOCAL)
else
	test -x .venv/bin/uv || .venv/bin/python -m pip install -q uv
	.venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python -r requirements.lock
	.venv/bin/uv pip install -q --python .venv/bin/python --no-deps $(LOCAL)
endif
	touch $@

wheels: setup  ## wheels for a machine without a network: FOR=cp312 INTO=folder HAVE=its-pip-freeze; there: make setup WHEELS=folder
	.venv/bin/python tools/wheels.py $(FOR) $(INTO) $(if $(HAVE),--have $(HAVE))

demo: setup  ## run every built project at embedded scale into runs/, then print published | ours | yours
	.venv/bin/python tools/demo.py $(PROJECT)

keep: setup  ## keep the verdicts of your demo in results/machines/, next to those of other kinds of machine
	.venv/bin/python tools/machines.py

tables: setup  ## regenerate every RESULTS.md and figure from the committed run logs
	set -e; for name in $(EACH); do $(MAKE) -C $$name tables; done
	.venv/bin/python tools/results.py

test: setup  ## run all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal $(addsuffix /tests,$(if $(PROJECT),$(PROJECT),$(PACKAGES))) $(if $(PROJECT),,tests)

site: setup  ## static results site in site/
	PYTHONPATH=tools .venv/bin/python -m website.build

rehearse: setup  ## run every table at paper scale, end to end, on tiny archives in a temporary copy
	printf '%s\n' $(EACH) | OMP_NUM_THREADS=1 xargs -P 2 -I NAME $(MAKE) -s -C NAME rehearse

campaign: setup  ## run what fits into MINUTES=, from the top of campaign.toml (or LIST=); the next campaign continues
	.venv/bin/python tools/campaign.py --minutes $(or $(MINUTES),$(error say how long: make campaign MINUTES=60)) $(if $(LIST),--list $(LIST))

gpucheck: setup  ## compare each training loop on CUDA in bf16 with float32 on the CPU; also resuming and evaluation
	.venv/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'gpucheck: torch finds no GPU')"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 8 -m gpu */tests/test_cuda.py

bench: setup  ## time us against the peers, into each project's runs/bench.json (on a GPU bench-cuda.json); slow
	set -e; for name in $(EACH); do $(MAKE) -C $$name bench; done
	.venv/bin/python -m shared_utils.benchmark $(addsuffix /runs/bench*.json,$(EACH))

record: setup  ## move finished runs, benchmarks and the drill into results/ (clean tree only)
	set -e; for name in $(EACH); do $(MAKE) -C $$name record; done
	if test -f runs/drill.jsonl; then mkdir -p results; cat runs/drill.jsonl >> results/drill.jsonl; rm runs/drill.jsonl; fi
	.venv/bin/python tools/results.py

doctor:  ## what this machine and .venv have, and a command that fixes each problem
	@$(PYTHON3) tools/doctor.py

drill: demo  ## SIGKILL every demo five times, restart it, compare the final metrics; into runs/drill.jsonl
	.venv/bin/python tools/drill.py $(PROJECT)

mutants: setup  ## plant small faults one at a time and count those that no test notices, into results/mutants.json; slow (AGAIN=1: only those)
	.venv/bin/python tools/mutants.py $(PROJECT) $(if $(AGAIN),--again)

alone:   ## each project in a separate environment: install, import, --help, smoke tables
	$(PYTHON3) tools/alone.py $(PROJECT)

lint: setup  ## ruff and mypy, check only
	.venv/bin/ruff check .
	.venv/bin/python -m mypy tools/*.py tools/website conftest.py */src

clean:   ## remove .venv, site/ and caches; runs/ and results/ stay
	rm -rf .venv site .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup wheels demo keep tables test site rehearse campaign gpucheck bench record doctor drill mutants alone lint clean
