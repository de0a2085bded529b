# Everything a fresh machine needs is Python >= 3.11 with venv, pip, and make.
# Paths are relative throughout, so that a checkout may lie anywhere, also under a name with spaces.

PYTHON ?= python3
VENV = .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.complete
# Apart from the other: the benchmarks' peers bring packages named benchmarks, tests and docs.
BENCH_VENV = .venv-bench
BENCH_PY = $(BENCH_VENV)/bin/python
BENCH_STAMP = $(BENCH_VENV)/.complete
# -P: with the checkout on sys.path, its folder kernels/ would pass for the Hugging Face package of that name.
# Two processes at least: most of the time goes into compiling, which one process does on one core. A file
# stays in one process, because its tests share what was compiled for them.
PYTEST = $(PY) -P -m pytest -n logical --dist loadfile

DEMO_ARGS =
PYTEST_ARGS =
BENCH_ARGS =

.DEFAULT_GOAL := help
.PHONY: help env demo test lint types pytest test-slow format bench bench-env clean

help:
	@echo 'make demo       train examples/digits.py privately (DEMO_ARGS="--help" for its options)'
	@echo 'make test       lint, types and tests'
	@echo 'make lint       ruff, check and format'
	@echo 'make types      mypy'
	@echo 'make pytest     the tests alone (PYTEST_ARGS="-k exchange" for some of them)'
	@echo 'make test-slow  the tests marked slow: audits and the like'
	@echo 'make format     let ruff rewrite what it can'
	@echo 'make bench      time, memory and FLOPs beside other libraries (BENCH_ARGS="--help" for its options)'
	@echo 'make env        build $(VENV) with the tested versions (all of the above but bench do that first)'
	@echo 'make clean      remove $(VENV), $(BENCH_VENV), builds and caches'
	@echo 'PYTHON=python3.12 VENV=.venv312, say, does the same in another environment.'

demo: $(STAMP)
	$(PY) examples/digits.py $(DEMO_ARGS)

test: lint types pytest

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

pytest: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# In the checkout's root, which so stands first on sys.path. Nothing else may run meanwhile.
bench: $(BENCH_STAMP)
	$(BENCH_PY) -m benchmarks $(BENCH_ARGS)

env: $(STAMP)

bench-env: $(BENCH_STAMP)

$(STAMP): EXTRA = dev
$(BENCH_STAMP): EXTRA = bench

# The stamp is written last: an environment whose building was cut short has none, and is built anew.
# torch goes first and alone, see constraints.txt. Modules are compiled when they are first imported: most
# of them never are, and compiling them all takes as long as the rest.
$(STAMP) $(BENCH_STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo '`$(PYTHON)` must be Python 3.11 or newer. Name another one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo '`$(PYTHON)` must have venv and ensurepip. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --no-input --no-compile -c constraints.txt torch
	$(@D)/bin/python -m pip install --no-input --no-compile -c constraints.txt -e '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist bridge/*.egg-info kernels/*.egg-info *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
