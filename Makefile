# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs in $(VENV); `make` alone lists the targets.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH ?= boot cold_start throughput overload soak
CODE := service gunicorn_conf.py tests bench helm
VARIANT ?= cuda
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' service/__init__.py)
BUILDER ?= docker

.DEFAULT_GOAL := help
.PHONY: help install serve test lint format bench chart image clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create the virtual environment with everything in it

$(STAMP): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or later is needed; name one with PYTHON=...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,onnx,openvino,otlp]'
	@touch $@

serve: $(STAMP) ## Serve the demo model with 2 workers (API on 8000, probes and metrics on 9000)
	HF_HUB_OFFLINE=1 $(BIN)/warmfleet serve

test: $(STAMP) ## Run the tests; ARGS='-k ready' narrows them
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## Check style, formatting, types and the direction of imports
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix --exit-zero $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(STAMP) ## Measure this machine, 50 minutes; BENCH='boot soak' names some of bench/*.py
	for name in $(BENCH); do HF_HUB_OFFLINE=1 $(BIN)/python bench/$$name.py || exit; done

chart: $(STAMP) ## Write what follows from the chart's values, the settings and the dashboard's tables
	$(BIN)/python helm/generate.py
	$(BIN)/python helm/dashboard.py

image: ## Build the container image warmfleet:VERSION-VARIANT (VARIANT=cpu or cuda, BUILDER=docker or buildah)
	$(BUILDER) build $(if $(filter docker,$(BUILDER)),,--format docker) --build-arg VARIANT=$(VARIANT) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) \
		--build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) --tag warmfleet:$(VERSION)-$(VARIANT) .

clean: ## Remove the virtual environment, caches and build output
	rm -rf $(VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find service tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
