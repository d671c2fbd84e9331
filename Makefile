# make demo    the embedded example, end to end; report in runs/demo/report.html
# make test    all tests
# make check   ruff and pyrefly alone (the tests run them too)
# make wheel   the sdist and the wheel in dist/, tried in an environment without a compiler
# make docs    the documentation's site, in build/docs
# make bench   the benchmarks of the ops
# make clean   removes the virtual environment and build outputs; never runs/
#
# Each sets up .venv first. PYTHON=python3.12 picks another interpreter; JOBS=1 tests in one process.

SHELL  := /bin/bash
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
DEMO   ?= runs/demo
CORES  := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# More than 4 workers spend their time importing torch.
JOBS   ?= $(shell if [ $(CORES) -gt 4 ]; then echo 4; else echo $(CORES); fi)

# The first interpreter that is new enough: a shim of pyenv may exist and still not run.
define FIND_PYTHON
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then found="$$python"; break; fi; \
done; \
if [ -z "$${found:-}" ]; then \
	echo "red needs Python 3.10 or newer; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1). Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
fi; \
if ! "$$found" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	echo "$$found has no venv module. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; \
fi
endef

.PHONY: demo test check docs bench wheel setup clean

setup: $(STAMP)

# One pip line for the lock: a range on torch resolved on its own would pull another torch.
# .installing marks an environment that pip was still writing to: after an interruption it is made anew.
$(STAMP): requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	@set -euo pipefail; \
	if [ -e $(VENV)/.installing ] || ! $(BIN)/python -c 'import pip' >/dev/null 2>&1; then \
		$(FIND_PYTHON); \
		echo "making $(VENV) with $$("$$found" --version)"; \
		"$$found" -m venv --clear $(VENV); \
	fi; \
	touch $(VENV)/.installing; \
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt; \
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .; \
	rm $(VENV)/.installing; \
	touch $@

demo: $(STAMP)
	$(BIN)/red demo --output_dir $(DEMO) --overwrite

# Workers times threads must not exceed the cores; a file's tests stay in one worker and share its fixtures. In their order: the kernels that are
# compiled take longest and come first.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder

# -n: every cross-reference must be found. Nothing is fetched.
docs: $(STAMP)
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(STAMP)
	OMP_NUM_THREADS=$(JOBS) $(BIN)/python -m pytest benchmarks --benchmark-only

wheel: $(STAMP)
	$(BIN)/python -m build --no-isolation --outdir dist .
	.ci/try_wheel dist $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info red_kernels/_csrc.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .hypothesis .benchmarks
