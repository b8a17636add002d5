# Everyday commands. `make help` lists them; every one of them sets up what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The newest of these that runs and is at least 3.11; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Test workers; tests mostly wait, so the number of cores is a good guess.
JOBS ?= auto
# More arguments for pytest: make test PYTEST_ARGS="-k cancel -x"
PYTEST_ARGS ?=

BIN := .venv/bin
READY := .venv/.installed
PROTO_READY := .venv-proto/.installed
TYPINGS_READY := typings/.generated
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check
PROTO := env PATH="$(CURDIR)/.venv-proto/bin:$$PATH"
PYTHON_FILES := $(wildcard sagecp tests bench clients protos deploy)

# The test folders of `make test`; of tests/faults the quick rows, and tests/e2e needs engines.
TEST_FOLDERS := $(wildcard tests/unit tests/contract tests/rpc tests/sim tests/console tests/observability tests/faults)
# How long `make soak` goes on, and which faults it draws.
MINUTES ?= 10
SEED ?= 0

.PHONY: help
help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(READY) $(PROTO_READY) $(TYPINGS_READY) ## Make .venv (the project, with its tools) and .venv-proto (the generators)

$(READY): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "setup: no Python of 3.11 or later found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "setup: installing sagecp and its tools into .venv with $$($(PYTHON) --version)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(PROTO_READY): protos/requirements.txt
	@if [ -z "$(PYTHON)" ]; then echo "setup: no Python of 3.11 or later found" >&2; exit 1; fi
	@echo "setup: installing the proto tools into .venv-proto"
	@[ -x .venv-proto/bin/python ] || $(PYTHON) -m venv .venv-proto
	@.venv-proto/bin/python $(PIP_INSTALL) --requirement protos/requirements.txt
	@touch $@

# google.rpc comes without types; the checker gets them from here.
$(TYPINGS_READY): $(PROTO_READY)
	@echo "setup: generating types for google.rpc into typings"
	@rm -rf typings && mkdir typings
	@include=$$(.venv-proto/bin/python -c 'import google.rpc.code_pb2 as m; print(m.__file__.removesuffix("/google/rpc/code_pb2.py"))'); \
	$(PROTO) python -m grpc_tools.protoc -I "$$include" --mypy_out=quiet:typings \
	  google/rpc/code.proto google/rpc/error_details.proto google/rpc/status.proto
	@touch $@

.PHONY: proto
proto: $(PROTO_READY) ## Format the protos and generate the stubs in sagecp/v1 anew
	$(PROTO) buf format --write protos
	rm -f sagecp/v1/*_pb2*.py sagecp/v1/*_pb2*.pyi
	$(PROTO) buf generate

.PHONY: format
format: $(READY) $(PROTO_READY) ## Rewrite Python and proto files in the project's format
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(PROTO) buf format --write protos

.PHONY: lint
lint: $(READY) $(PROTO_READY) ## Check format and habits of Python and protos, compatibility, and that the stubs are current
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/ruff check $(PYTHON_FILES)
	@$(PROTO) protos/check.sh

.PHONY: type
type: $(READY) $(TYPINGS_READY) ## Check types, strictly
	$(BIN)/mypy $(wildcard sagecp tests bench clients/python)

.PHONY: test
test: $(READY) $(PROTO_READY) ## Run the tests that need no engine, in parallel
	$(BIN)/python -m pytest $(TEST_FOLDERS) --numprocesses $(JOBS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: faults
faults: $(READY) $(PROTO_READY) ## Run every row of the fault matrix: processes killed, disks filled, lines cut (minutes)
	$(BIN)/python -m pytest tests/faults --slow-faults --numprocesses $(JOBS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: soak
soak: $(READY) ## Mixed load and random faults for MINUTES=10, with a ledger at the end
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED)

.PHONY: e2e
e2e: $(READY) $(PROTO_READY) ## Install a small real vLLM (about 2.4 GB, once) and drive two of them through the stubs
	tests/e2e/engine/install.sh >/dev/null
	$(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS)

.PHONY: check
check: lint type test ## All checks and tests that need no engine

.PHONY: demo
demo: $(READY) ## Start everything on this machine with simulated engines and replay a real trace through it
	$(BIN)/sagecp demo

.PHONY: bench
bench: $(READY) ## Measure what the control plane costs; prints a report, asserts nothing
	$(BIN)/python -m bench

.PHONY: clean
clean: ## Remove environments, caches and generated types (stubs stay: they are part of the source)
	rm -rf .venv .venv-proto typings build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find sagecp tests bench clients protos deploy -name __pycache__ -type d -prune -exec rm -rf {} +
