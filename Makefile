# Every target installs what it needs into .venv first; PYTHON chooses the interpreter that .venv is made with, such as
# `make test PYTHON=python3.12`. All paths are relative, so that the project's own path may hold spaces.

PYTHON ?= python3
TARGET ?= localhost:50051
ARGS ?=
PEERS ?= .peers
SECONDS ?= 600

BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH := .venv/.installed-bench
PROTOC := .venv/protoc
# Stubs are generated with grpcio-tools 1.71, which has no wheels for Python 3.14.
PROTOC_PYTHON ?= $(BIN)/python
# By name, so that tests/e2e, which takes longest, comes first.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"
# The tests in $(1): two at a time, and then those marked `alone` (5: there are none). With ARGS, what these choose.
run_tests = $(if $(ARGS),$(BIN)/python -m pytest $(1) $(ARGS),$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(1) && \
	{ $(BIN)/python -m pytest -m alone $(1) || [ $$? -eq 5 ]; })

.DEFAULT_GOAL := help

# The stamp names the folder that it was made in: an environment that was moved or copied here is installed anew.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

$(INSTALLED): pyproject.toml constraints.txt tools/install.sh
	@PYTHON="$(PYTHON)" sh tools/install.sh

$(PROTOC)/.installed: tools/requirements-protos.txt $(INSTALLED)
	@$(PROTOC_PYTHON) -m venv --clear $(PROTOC)
	@$(PROTOC)/bin/python -m pip --disable-pip-version-check install -qq --only-binary :all: -r tools/requirements-protos.txt || \
		{ echo "parley: stubs need Python 3.11 to 3.13: name one with make PROTOC_PYTHON=/path/to/python3.13" >&2; exit 1; }
	@touch $@

$(BENCH): $(INSTALLED)
	@$(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt -e '.[bench]'
	@touch $@

.PHONY: help
help: ## show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' Makefile

##### running

.PHONY: demo
demo: $(INSTALLED) ## start the service, stream one real answer, stop the service
	@$(BIN)/python tools/demo.py

.PHONY: serve
serve: $(INSTALLED) ## serve a model until Ctrl-C; ARGS="--model … --port …"
	@exec $(BIN)/parleyd serve $(ARGS)

.PHONY: chat
chat: $(INSTALLED) ## talk with the service at TARGET=localhost:50051
	@exec $(BIN)/parley chat --target "$(TARGET)" $(ARGS)

##### tests

.PHONY: test
test: $(INSTALLED) ## run all tests; ARGS are pytest's, and choose which
	@$(call run_tests,)

.PHONY: test-unit
test-unit: $(INSTALLED) ## run the tests of single modules
	@$(call run_tests,tests/unit)

.PHONY: test-integration
test-integration: $(INSTALLED) ## run the tests of gateway and client over loopback, without a model
	@$(call run_tests,tests/integration)

.PHONY: test-e2e
test-e2e: $(INSTALLED) ## run the tests of the whole service with a real model, and of the package
	@$(call run_tests,tests/e2e)

.PHONY: test-clients
test-clients: $(INSTALLED) ## build the Node client and run its tests, alone and against the service
	@$(BIN)/python -m pytest tests/e2e/test_node_client.py $(ARGS)

.PHONY: test-mesh
test-mesh: $(INSTALLED) ## run the tests behind a real Envoy, and those of gRPC-Web in a browser
	@$(BIN)/python -m pytest tests/mesh $(ARGS)

.PHONY: test-robustness
test-robustness: $(INSTALLED) ## run traffic under faults for SECONDS=600, from a random seed that it prints
	@ROBUSTNESS_SEED=$${ROBUSTNESS_SEED:-$$(date +%s)} ROBUSTNESS_SECONDS=$$(( $(SECONDS) * 2 / 9 )) \
		$(BIN)/python -m pytest tests/robustness -s $(ARGS)

.PHONY: test-gpu
test-gpu: $(INSTALLED) ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

.PHONY: soak
soak: $(INSTALLED) ## run traffic under random faults for half an hour, and print the figures
	@$(BIN)/python -m tests.robustness.soak $(ARGS)

.PHONY: fuzz
fuzz: $(INSTALLED) ## send messages and bytes of every kind for SECONDS=600
	@FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/fuzz --timeout 0 $(ARGS)

##### checks

.PHONY: verify
verify: verify-format verify-lint verify-types verify-layers verify-security verify-protos verify-docs ## run all checks

.PHONY: verify-format
verify-format: $(INSTALLED) ## check the code's format
	@$(BIN)/ruff format --check .

.PHONY: verify-lint
verify-lint: $(INSTALLED) ## check for likely mistakes
	@$(BIN)/ruff check .

.PHONY: verify-types
verify-types: $(INSTALLED) ## check the types of our packages
	@$(BIN)/mypy

.PHONY: verify-layers
verify-layers: $(INSTALLED) ## check who imports whom
	@$(BIN)/python tools/verify_layers.py

.PHONY: verify-security
verify-security: $(INSTALLED) ## check for known kinds of holes
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive clients/python service

.PHONY: audit
audit: $(INSTALLED) ## ask PyPI for known holes in the versions of constraints.txt
	@$(BIN)/python -m venv .venv/audit
	@.venv/audit/bin/python -m pip --disable-pip-version-check install -qq pip-audit
	@.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt $(ARGS)

.PHONY: verify-protos
verify-protos: $(INSTALLED) $(PROTOC)/.installed ## check the protos' style, compatibility and stubs
	@$(BIN)/buf lint protos
	@$(BIN)/buf breaking protos --against protos/baseline.binpb
	@$(PROTOC)/bin/python tools/protos.py verify

.PHONY: verify-docs
verify-docs: $(INSTALLED) ## check that generated pages are current and links lead somewhere
	@$(BIN)/python tools/generate_configuration_docs.py --check
	@$(BIN)/python tools/generate_api_docs.py --check
	@$(BIN)/python tools/verify_links.py

##### repairs

.PHONY: fix
fix: fix-protos fix-docs ## repair format, imports, stubs and generated pages
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

.PHONY: fix-protos
fix-protos: $(PROTOC)/.installed ## generate the stubs from the protos
	@$(PROTOC)/bin/python tools/protos.py fix

.PHONY: fix-docs
fix-docs: $(INSTALLED) ## generate docs/configuration.md and docs/api.md
	@$(BIN)/python tools/generate_configuration_docs.py
	@$(BIN)/python tools/generate_api_docs.py

.PHONY: release-protos
release-protos: $(INSTALLED) ## at a release: what is in protos/ now is what later versions stay compatible with
	@$(BIN)/buf build protos --exclude-source-info -o protos/baseline.binpb

##### benchmarks

.PHONY: bench
bench: $(BENCH) ## measure everything that has a target against the peers that are installed (10 minutes)
	@$(BIN)/python -m benchmarks.suite --peers "$(PEERS)" $(ARGS)

.PHONY: bench-full
bench-full: $(BENCH) ## the same with all peers and workloads (more than an hour)
	@$(BIN)/python -m benchmarks.suite --size full --peers "$(PEERS)" $(ARGS)

.PHONY: bench-peers
bench-peers: $(INSTALLED) ## install the peers that bench compares with into PEERS=.peers
	@sh benchmarks/peers/install.sh "$(PEERS)"

.PHONY: bench-gateway
bench-gateway: $(INSTALLED) ## measure the gateway alone
	@$(BIN)/python -m benchmarks.gateway_cpu $(ARGS)

.PHONY: bench-online
bench-online: $(BENCH) ## measure the service under load; ARGS="--peer vllm --concurrency 4 …"
	@$(BIN)/python -m benchmarks.online --peers "$(PEERS)" $(ARGS)

.PHONY: bench-offline
bench-offline: $(BENCH) ## measure the engine alone, in process; ARGS="--peer llama-cpp …"
	@$(BIN)/python -m benchmarks.offline --peers "$(PEERS)" $(ARGS)

.PHONY: bench-structured
bench-structured: $(INSTALLED) ## measure what a grammar costs: to compile, and in a step of 16 streams
	@$(BIN)/python -m benchmarks.structured $(ARGS)

.PHONY: bench-overload
bench-overload: $(INSTALLED) ## measure overload, 2,000 streams, a killed worker and the bookkeeping (7 minutes)
	@$(BIN)/python -m benchmarks.overload $(ARGS)

.PHONY: bench-layers
bench-layers: $(INSTALLED) ## measure the engine's layers, variant against variant
	@$(BIN)/python -m benchmarks.layers $(ARGS)

.PHONY: bench-attention
bench-attention: $(INSTALLED) ## measure attention on this processor, compiled against gathered
	@$(BIN)/python -m benchmarks.attention $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(INSTALLED) ## measure the engine on a GPU against its bandwidth
	@$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json $(ARGS)

##### the rest

.PHONY: clean
clean: ## remove .venv, caches and build results
	@rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist gen \
		clients/node/node_modules clients/node/dist clients/node/src/gen \
		clients/web/node_modules clients/web/dist clients/web/src/gen
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
