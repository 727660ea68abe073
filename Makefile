# make demo    train on real text, reload, generate, draw (2 minutes on two cores)
# make test    the test suite            make test-slow   everything, learning tests included
# make quality ruff and mypy             make laws        the ten laws of a memory, every family
# make bench   side by side with peers   make hf-suite    transformers' own model tests on our model types
# All work in .venv, made on first use with PYTHON (3.11 or newer).

PYTHON ?= python3
TESTS ?= tests
WORKERS ?= 2
TYPES ?= maru dual_memory neural_memory_transformer titan_mac memory_bank_transformer
PY := .venv/bin/python
# Spinning OpenMP threads cost up to 10x on busy machines; each test worker takes one.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	$(PY) -P -m pytest --import-mode=importlib -q -n $(WORKERS) --dist loadgroup

PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
DOTS := awk '/^(Collecting|Processing)/ { printf "."; fflush() } END { print "" }'
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test test-slow laws quality style hf-suite bench clean

demo: .venv/.ok
	$(PY) examples/demo.py

test: .venv/.ok
	$(PYTEST) $(TESTS) -m "not slow"

test-slow: .venv/.ok
	$(PYTEST) $(TESTS)

laws: .venv/.ok
	$(PYTEST) tests/laws

quality: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

style: .venv/.dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

hf-suite: .venv/.ok
	OMP_WAIT_POLICY=PASSIVE $(PY) -P tests/hf_suite/run.py $(TYPES)

bench: .venv/.dev
	$(PY) benchmarks/selective_scan.py
	$(PY) benchmarks/maru.py train
	$(PY) benchmarks/maru.py decode

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memzoo needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "making .venv (once; a minute or two)"
	@$(PYTHON) -m venv .venv

.venv/.ok: setup.py pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing memzoo and what its tests need (a dot per package)"
	@$(PIP) -e '.[test]' | $(DOTS)
	@touch $@

.venv/.dev: .venv/.ok
	@echo "installing the developer tools"
	@$(PIP) -e '.[dev]' | $(DOTS)
	@touch $@
