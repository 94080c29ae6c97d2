SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
RESULTS := benchmarks/results
PROTOS := braid/v1/common.proto braid/v1/attention.proto braid/v1/orchestrator.proto

.PHONY: demo test smoke lint format protos protos-check bench plots clean

demo: $(INSTALLED)  ## Set up, start the three processes on the small model, stream text, show where every layer went.
	@$(BIN)/python benchmarks/demo.py

test: $(DEV)  ## Set up and run the whole suite.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

smoke: $(DEV)  ## The seconds-long check that the whole works.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m smoke -q

bench: $(INSTALLED)  ## Braid against its peers, each benchmark in one run; reports go to benchmarks/results.
	@mkdir -p $(RESULTS)
	$(BIN)/braid bench decode --peers embedded,grpc_bytes --out $(RESULTS)/decode.json
	$(BIN)/braid bench prefill --peers embedded,grpc_bytes --out $(RESULTS)/prefill.json
	$(BIN)/braid bench hop --out $(RESULTS)/hop.json
	$(BIN)/braid bench overlap --out $(RESULTS)/overlap.json
	$(BIN)/braid bench scale --out $(RESULTS)/scale.json

plots: $(DEV)  ## Pictures of the reports in benchmarks/results, as PNG and SVG.
	@$(BIN)/python benchmarks/plots.py

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
