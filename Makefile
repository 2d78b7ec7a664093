# One target per habit. `make quickstart` is all that a new machine needs; `make check` is what CI runs.

# Any Python from 3.11 on; choose another one with: make venv PYTHON=python3.12
PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(python))))
BIN := .venv/bin

.PHONY: help venv quickstart check lint test test-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   compare fine-tuning methods on this machine, without a GPU"
	@echo "make venv         .venv with the exact versions in requirements.lock"
	@echo "make check        lint and test"
	@echo "make lint         ruff and mypy"
	@echo "make test         the tests that need no GPU"
	@echo "make test-gpu     the tests that need one"
	@echo "make clean        remove caches and build files (.venv, assets and outputs stay)"

venv: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { \
		echo "ray_peft needs Python 3.11 or later, but here is `python3 --version 2>&1`."; \
		echo "Install a later one, then: make venv PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "ray_peft needs Python 3.11 or later, but $(PYTHON) is `$(PYTHON) --version 2>&1`."; \
		echo "Choose a later one: make venv PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setting up .venv with `$(PYTHON) --version`, once; about 3 minutes"
	@$(PYTHON) -m venv .venv || { \
		echo "No virtual environment: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@# setuptools comes from the lock, so the build needs no environment of its own.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

quickstart: venv
	$(BIN)/python -m ray_peft.quickstart --out assets
	$(BIN)/ray-peft sweep search_spaces/quickstart.yaml --out outputs/quickstart

check: lint test

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy ray_peft jobs

test: venv
	$(BIN)/python -m pytest -n 2 -m "not gpu"

test-gpu: venv
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find ray_peft jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
