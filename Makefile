# SPDX-License-Identifier: Apache-2.0
# Every target makes the environment it needs. PYTHON=python3.12 chooses another interpreter, which
# gets an environment of its own; ARGS="..." is handed to the command that a target runs.

ifdef PYTHON
  VENV = .venv-python$(VERSION)
else
  PYTHON := $(shell for p in python3.11 python3.12 python3; do \
      $$p -c '' 2>/dev/null && echo $$p && break; done)
  VENV = .venv
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
  $(error no Python at "$(PYTHON)": apollo_jax needs 3.11 or 3.12, see PYTHON=...)
endif
LOCK := requirements/lock-py$(subst .,,$(VERSION))

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet
WORKDIR ?= runs/demo
WORKERS ?= 2

.PHONY: help demo test check parity tpu golden format lock
help:
	@echo 'make demo     build a video language model out of mp4 files and watch it answer'
	@echo 'make test     the tests'
	@echo 'make check    lint, formatting and types'
	@echo 'make parity   the tests that compare with PyTorch (installs the torch extra)'
	@echo 'make tpu      the tests that compile for TPUs, on any Linux machine (fetches libtpu)'
	@echo 'make golden   record the golden curves anew (the commit says why they moved)'
	@echo 'make format   let ruff mend what it can'
	@echo 'make lock     resolve requirements/lock-*.txt again'

demo: $(VENV)/.installed
	$(BIN)/apollo-jax demo --workdir $(WORKDIR) $(ARGS)

# Most programs run once, on little data: to compile them is the work, so the compiler hurries.
test: export XLA_FLAGS = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

parity: $(VENV)/.torch
	$(BIN)/python -m pytest -m parity $(ARGS)

# Where libtpu is on the path, jax looks for TPUs and complains: so it is kept apart.
tpu: $(VENV)/libtpu/.installed
	PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m pytest -m tpu $(ARGS)

golden: $(VENV)/.installed
	APOLLO_GOLDEN=record $(BIN)/python -m pytest tests/apollo_jax/training/test_golden.py $(ARGS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock:
	$(PYTHON) -m venv build/lock-$(VERSION)
	build/lock-$(VERSION)/bin/python requirements/lock.py

$(VENV)/.installed: $(LOCK).txt pyproject.toml
	@echo 'making $(VENV) with Python $(VERSION): about a minute, once'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r $(LOCK).txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.torch: $(LOCK)-torch.txt $(VENV)/.installed
	$(PIP) -r $(LOCK).txt -r $(LOCK)-torch.txt
	@touch $@

$(VENV)/libtpu/.installed: $(LOCK)-tpu.txt $(VENV)/.installed
	$(PIP) --no-deps --upgrade --target $(VENV)/libtpu -r $(LOCK)-tpu.txt
	@touch $@

requirements/lock-py%.txt:
	@echo 'apollo_jax needs Python 3.11 or 3.12, and "$(PYTHON)" is Python $(VERSION).'
	@echo 'Name another one (make test PYTHON=python3.12), or lock this one (make lock PYTHON=...).'
	@exit 1
