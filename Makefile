# Every goal sets up what it needs and skips what is there already: `make demo` on a fresh clone, `make test` before a commit.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The first of these that is new enough and not too new; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= python3 python3.11 python3.12 python3.13
# --no-compile halves the time: only what is imported is compiled, when it is imported first. Many a container forbids to keep that:
# then each process would compile all that it imports (15 s for torch, transformers and Ray, where it is 6).
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt
RECORD := $(BIN)/python -c 'import json, pathlib, sys, time; p = pathlib.Path("build/install.json"); \
	p.parent.mkdir(exist_ok=True); \
	d = json.loads(p.read_text()) if p.exists() else {}; \
	d[sys.argv[1]] = round(time.time() - float(sys.argv[2]), 1); p.write_text(json.dumps(d) + "\n")'

.PHONY: help demo test test-vllm test-gpu bench lint format clean postgres

help: ## list the goals
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.adaptory ## sweep a real model over real data, serve the winner and ask it (nine to fifteen minutes, no GPU)
	$(BIN)/python jobs/examples/demo.py

test: lint | postgres ## lint, types, import borders and every test
	$(BIN)/python -m pytest tests/unit --numprocesses logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest tests/integration --numprocesses logical --maxprocesses 2 --dist loadfile -o timeout=1500
	$(BIN)/python -m pytest tests/e2e

test-vllm: $(VENV)/.adaptory-dev ## vLLM behind the Engine protocol and on Ray Serve, in an environment of its own (3 GB in build/)
	$(BIN)/python tests/vllm/run.py $(ARGS)

test-gpu: $(VENV)/.adaptory-dev ## training, sweeps and the engine on an NVIDIA GPU, against CPU, transformers and PEFT
	$(BIN)/python -m pytest -p no:cacheprovider tests/gpu $(ARGS)

bench: $(VENV)/.adaptory-dev ## list the benchmarks; NAME=… runs one
ifdef NAME
	$(BIN)/python tests/bench/$(NAME).py $(ARGS)
else
	@$(BIN)/python -c 'import ast, pathlib; [print("make bench NAME=" + p.stem, " ", \
		ast.get_docstring(ast.parse(p.read_text())).splitlines()[0]) for p in sorted(pathlib.Path("tests/bench").glob("*.py"))]'
endif

lint: $(VENV)/.adaptory-dev ## style, types and import borders, without the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests/bench/sides $(BIN)/mypy tests/gateway_process.py tests/bench/sides/*.py
	MYPYPATH=tests/bench $(BIN)/mypy tests/bench/*.py
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.adaptory-dev ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built (not .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find orchestrator jobs cluster serving tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian keeps venv in a package of its own.
$(BIN)/python:
	@mkdir -p build && date +%s.%N > build/.started
	@for name in $(PYTHON) none; do \
	  "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break || true; done; \
	if [ "$$name" = none ]; then \
	  echo "Adaptory needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=/path/to/python." >&2; exit 1; fi; \
	if ! "$$name" -m venv $(VENV) > build/venv.log 2>&1; then \
	  rm -rf $(VENV); \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then \
	    cat build/venv.log >&2; \
	    echo "Python's venv is missing (Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; fi; \
	  echo "Installing python3-venv with apt-get."; \
	  apt-get update -qq && apt-get install -y -qq python3-venv > /dev/null; \
	  "$$name" -m venv $(VENV); fi

# What a person needs to fine-tune and serve: no DeepSpeed (several workers) and no development tools. JSON answers need
# xgrammar, which asks for a gigabyte of Triton, and on a CPU does not use it.
$(VENV)/.adaptory: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Adaptory into $(VENV) (one to two minutes)."
	@started=$$(cat build/.started 2>/dev/null || date +%s.%N); rm -f build/.started; \
	$(PIP_INSTALL) --editable '.[client]'; \
	$(PIP_INSTALL) --no-deps xgrammar apache-tvm-ffi; \
	$(RECORD) install "$$started"
	@touch $@

# DeepSpeed's own setup imports torch, so it is built here, after torch; its C++ parts are compiled on first use.
$(VENV)/.adaptory-dev: $(VENV)/.adaptory
	@echo "Installing DeepSpeed and the development tools."
	@started=$$(date +%s.%N); \
	$(PIP_INSTALL) setuptools wheel ninja py-cpuinfo; \
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation deepspeed; \
	$(PIP_INSTALL) --editable '.[dev]'; \
	$(RECORD) install_dev "$$started"
	@touch $@

# The tests start a server of their own, as another user than root; without its programs they skip what needs it, and say so.
postgres:
	@if command -v initdb > /dev/null || ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "Installing postgresql with apt-get."; \
	  apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql > /dev/null; \
	else echo "PostgreSQL is missing, so its tests are skipped (Debian and Ubuntu: apt-get install postgresql)."; fi
