# One target per habit; bootstrap.py does the work, also where there is no make: python bootstrap.py quickstart
# `make quickstart` is all that a new machine needs; `make check` is what CI runs.

# Any Python 3 starts it. The .venv is made of the newest Python that is found; choose another one with:
#   make venv PYTHON=python3.12
RUN := $(if $(PYTHON),PYTHON="$(PYTHON)") $(firstword $(foreach name,python3 python,$(shell command -v $(name) 2>/dev/null)) python3) bootstrap.py

.PHONY: help venv quickstart check lint test test-gpu soak clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   compare fine-tuning methods on this machine, without a GPU"
	@echo "make venv         .venv with the exact versions in requirements.lock"
	@echo "make check        lint and test"
	@echo "make lint         ruff and mypy"
	@echo "make test         the tests that need no GPU; python -m pytest -m long runs what it leaves out"
	@echo "make test-gpu     the tests that need one"
	@echo "make soak         a sweep whose processes are killed at random, for half an hour"
	@echo "make clean        remove caches and build files (.venv, assets and outputs stay)"

venv quickstart lint test test-gpu soak:
	@$(RUN) $@

check: lint test

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find ray_peft jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
