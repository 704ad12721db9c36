# Two commands matter: `make demo` and `make test`. Both do all set-up first; a second run installs and fetches nothing.
# Words the environment may set: XDG_CACHE_HOME (images and downloads), HIL_OFFLINE=DIR (a folder made by `make offline`).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PEERS := .venv-peers
# A test run starts some hundred Pythons: each would compile everything again where the environment forbids bytecode.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode
# Pytest workers: one flies the shared mission, one has all other tests with boards (at most two are up at once), two the
# rest. With three, a fifth of two cores' time is lost in waiting.
WORKERS ?= 4

.PHONY: help setup system venv images demo test lint bench soak offline clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: system images ## system packages, .venv, images in the cache

system: ## Debian packages (asks sudo when not root; starts no service)
	@hil/virtual/system-packages.sh

venv: $(VENV)/.installed ## Python packages into .venv

$(VENV)/.installed: pyproject.toml hil/virtual/system-packages.sh
	@hil/virtual/system-packages.sh
	@test -x $(PY) || { echo "setup: creating $(VENV)"; python3 -m venv $(VENV); }
	@echo "setup: installing Python packages into $(VENV)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check \
	    $(if $(HIL_OFFLINE),--no-index --find-links "$(HIL_OFFLINE)/wheels") -e '.[test,lint]'
	@touch $@

images: venv ## boot images, keys, model and Prometheus into the cache
	@$(VENV)/bin/hil virtual images

demo: setup ## fly the Star-Compute Qwen-3 mission on the virtual bench
	@$(VENV)/bin/hil demo

test: setup ## the whole test suite
	@$(VENV)/bin/pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: venv ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup $(PEERS)/.installed ## figures next to a named peer, in one run
	@$(PEERS)/bin/python tests/benchmarks/run_all.py $(ARGS)

$(PEERS)/.installed: pyproject.toml
	@test -x $(PEERS)/bin/python || { echo "setup: creating $(PEERS)"; python3 -m venv $(PEERS); }
	@echo "setup: installing the peers of the benchmarks into $(PEERS)"
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check \
	    $(if $(HIL_OFFLINE),--no-index --find-links "$(HIL_OFFLINE)/wheels") -e '.[test,peers]'
	@touch $@

soak: setup ## what takes longer than 30 s: kill storms, interrupted builds, repeated flights
	@$(VENV)/bin/pytest -m soak tests $(ARGS)

offline: setup ## fill OFFLINE_DIR with every wheel and package a lab without internet needs
	@test -n "$(OFFLINE_DIR)" || { echo "say where: make offline OFFLINE_DIR=/media/stick/hil"; exit 4; }
	@hil/virtual/system-packages.sh --download "$(OFFLINE_DIR)/debs"
	@$(VENV)/bin/pip download --quiet --disable-pip-version-check -d "$(OFFLINE_DIR)/wheels" \
	    '.[test,lint,peers]' 'setuptools>=68' wheel
	@$(VENV)/bin/hil virtual images --fill-offline "$(OFFLINE_DIR)"

clean: ## remove the virtual environment and caches of tools (images stay in the cache)
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
