# Two commands are all a newcomer needs: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK = true
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: run test test-all check format docs ui flow server worker deploy clean

run: $(VENV)/installed        ## bring all six stages up to date and print what came of it
	@$(BIN)/python -m flows.local

test: $(VENV)/installed check ## linter, type checker, tests
	@$(BIN)/python -m pytest

test-all: $(VENV)/installed check ## the same with the slow tests
	@$(BIN)/python -m pytest -m ""

check: $(VENV)/installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(VENV)/installed       ## pages made from the source
	@$(BIN)/python -m flows.catalogue

ui: $(VENV)/installed         ## MLflow on http://127.0.0.1:5000
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 --port 5000 \
		--workers 1 --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"

flow: $(VENV)/installed       ## the same pipeline as a Prefect flow
	@$(BIN)/python -m flows.pipeline

server: $(VENV)/installed     ## Prefect and MLflow on 127.0.0.1, with a password: see docs/workers.md
	@$(BIN)/python -m flows.services server

worker: $(VENV)/installed     ## take runs from a pool: make worker POOL=gpu GPU=0
	@$(BIN)/python -m flows.services worker $(or $(POOL),cpu) --gpu $(or $(GPU),0)

deploy: $(VENV)/installed     ## tell the server about pools, deployments, schedules
	@$(BIN)/python -m flows.services deploy

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "drawplate needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing pinned packages into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) data models reports metrics lineage .drawplate
