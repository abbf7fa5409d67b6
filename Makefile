# From a clean clone: `make demo` shows the whole thing, `make test` tests it, `make check` is what CI runs.
# Everything is installed into .venv here; pip's own configuration decides where packages come from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
INPUTS := pyproject.toml constraints.txt

# Tests and checks never touch the network.
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The report's tests drive a real browser. Where none can be had they are left out, and that is said; CI must have one.
BROWSER := $(BIN)/python -m tests.report.browser
BROWSER_TESTS := tests/report/test_browser.py

.DEFAULT_GOAL := help
.PHONY: help demo test check lint docs browser clean

help:
	@echo "make demo    install into $(VENV), then continue real prompts with early exits"
	@echo "make test    install the development tools too, then run the tests"
	@echo "make check   lint, formatting, types, import contracts, documents, tests: what CI runs"
	@echo "make browser find a Chromium for the report's tests, or install one (root on Debian)"
	@echo "make lint    the fast part of check: ruff and formatting"
	@echo "make clean   remove $(VENV), caches and build output"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"DYNAMAX needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that pip takes the build that this machine is configured for (a CPU one, say).
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV) (minutes the first time) …"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/dynamax demo

test: browser
	$(OFFLINE) $(BIN)/python -m pytest -n 2 $$($(BROWSER) > /dev/null || echo --ignore=$(BROWSER_TESTS))

browser: $(VENV)/.installed-dev
	@$(BROWSER) > /dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "installing chromium-headless-shell for the report's tests …"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium-headless-shell > /dev/null; \
	fi || true
	@$(BROWSER) > /dev/null || { \
	  echo "no Chromium found: $(BROWSER_TESTS) is left out. Install one (Debian: chromium-headless-shell) or set DYNAMAX_CHROMIUM."; \
	  test "$$CI" != true; \
	}

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: $(VENV)/.installed-dev
	$(OFFLINE) $(BIN)/python tools/check_docs.py

# Tests come last: pytest's closing line is the last thing printed.
check: lint browser
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(OFFLINE) $(BIN)/python tools/check_docs.py
	$(OFFLINE) $(BIN)/python -m pytest -n 2 $$($(BROWSER) > /dev/null || echo --ignore=$(BROWSER_TESTS))

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests tools recipes -name __pycache__ -type d -prune -exec rm -rf {} +
