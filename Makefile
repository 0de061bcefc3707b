# `make demo` and `make test` each do all the set-up they need, a browser included.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# The suite starts a thousand processes; each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup browser check test demo demo-repair bench soak matrix format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     buy a teapot in a demo shop through a real MCP client"
	@echo "make demo-repair  mend a workflow whose page has changed, and let its failed run go on"
	@echo "make test     run the test suite"
	@echo "make check    formatter, linter, type checker, import rules"
	@echo "make bench    measure the store, replay and start-up on this machine"
	@echo "make soak     kill servers and workers at random under 200 runs, for some minutes"
	@echo "make matrix   kill everybody at every boundary of a run, for some minutes"
	@echo "make format   format the code"
	@echo "make clean    remove what make has made"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mcp-flow needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@# Debian keeps ensurepip in a package of its own.
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update && apt-get install -y python3-venv; \
	  else echo "Python has no venv module. Install it: sudo apt-get install python3-venv" >&2; exit 1; fi; }
	$(PYTHON) -m venv .venv
	@# The pip that a fresh venv has is older than dependency groups.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --build-constraint constraints.txt --editable . --group dev
	@touch $(STAMP)

browser: setup
	@$(BIN)/python -m mcp_flow browser install

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup browser
	$(BIN)/python -m pytest

demo: setup browser
	@$(BIN)/python examples/demo.py

demo-repair: setup browser
	@$(BIN)/python examples/demo_repair.py

bench: setup browser
	@$(BIN)/python bench/run.py

soak: setup browser
	@$(BIN)/python tests/soak.py

matrix: setup browser
	MCP_FLOW_TEST_MATRIX=full $(BIN)/python -m pytest tests/crash

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
