# The whole house in six commands. Only Python (3.11 or newer) and make are needed; everything else lands in .venv
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := offline,openvino,postgres,ray,clean,tensorboard,dev
export NO_ALBUMENTATIONS_UPDATE := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo ui dashboard test test-fast check lock
help:            ## show this help
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ \t/' | expand -t 14

setup: .venv/.ready  ## make the environment .venv (about 3 minutes, 7 GB: torch brings its GPU libraries)

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; choose one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: setup      ## the whole job on scikit-learn's digits, under 3 minutes
	@$(BIN)/python entrypoints/demo.py

ui: setup        ## MLflow over mlruns/, at http://127.0.0.1:5000
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
	  --backend-store-uri sqlite:///mlruns/mlflow.db --no-serve-artifacts --default-artifact-root "$(CURDIR)/mlruns/artifacts"

dashboard: setup ## Optuna's dashboard over mlruns/optuna.db
	@$(BIN)/optuna-dashboard sqlite:///mlruns/optuna.db

test: setup      ## style, types and the whole test suite (under 15 minutes on 2 cores)
	@$(MAKE) --no-print-directory check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup ## the quick part of the suite, under 2 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: setup     ## ruff and strict mypy
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

lock: setup      ## write constraints.txt from what .venv holds now
	@{ head -2 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude octofold; } > .venv/lock.txt
	@mv .venv/lock.txt constraints.txt
