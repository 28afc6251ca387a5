# The environment is .venv, made once with $(PYTHON) and brought up to date when the requirements change.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# One thread by default: the tests' models are tiny, and threads that wait for each other cost more than they bring.
# Each core takes a file of tests at a time.
OMP_NUM_THREADS_FOR_TESTS ?= 1

.PHONY: help venv demo demo-causal test test-quick lint docs format clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target what; do printf '  make %-11s %s\n' "$$target" "$$what"; done

venv: $(VENV)/requirements.stamp ## Make the environment

demo: $(VENV)/requirements.stamp ## Predict the mood of tweets and film reviews in nine ways: a table in a few minutes
	@$(RUN) examples/demo/fetch_demo_assets.py
	@$(RUN) examples/demo/demo.py

demo-causal: $(VENV)/requirements.stamp ## Tell good film reviews from bad ones with a causal language model: a few minutes
	@$(RUN) examples/demo/fetch_demo_assets.py --causal
	@$(RUN) examples/demo/demo_causal.py

test: $(VENV)/requirements-dev.stamp ## Run the tests
	@OMP_NUM_THREADS=$(OMP_NUM_THREADS_FOR_TESTS) $(RUN) -m pytest -q --numprocesses auto --dist loadfile

test-quick: $(VENV)/requirements-dev.stamp ## Run the tests of kernels, data, prompts and solvers: under a minute
	@OMP_NUM_THREADS=$(OMP_NUM_THREADS_FOR_TESTS) $(RUN) -m pytest -q --numprocesses auto --dist worksteal \
		-m "not slow" --thin 5 tests/kernels tests/data tests/prompts tests/solvers

lint: $(VENV)/requirements-dev.stamp ## Check style, docstrings and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/requirements-docs.stamp ## Build the documentation with its API reference into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet
	@echo "site/index.html is the first page"

format: $(VENV)/requirements-dev.stamp ## Format the code and apply safe fixes
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## Remove the environment, the caches and what the demos made
	rm -rf .cache/demo data/demo result/demo result/demo-causal
	rm -rf $(VENV) build site .pytest_cache .ruff_cache .mypy_cache .hypothesis src/lmntk.egg-info

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: name a newer one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements.stamp: requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/requirements-dev.stamp: requirements.txt requirements-dev.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/requirements.stamp

$(VENV)/requirements-docs.stamp: requirements-docs.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@
