# Every target sets itself up: Python 3.11 or newer, make and git are enough.
PYTHON ?= python3
BIN := .venv/bin
UV := uv==0.13.9
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: setup demo test lint bench gpu_check cifar10 docs pins
setup: .venv/ready

demo: STARTED := $(shell date +%s)
demo: .venv/ready
	$(BIN)/python -u launch/demo.py --started $(STARTED)

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	bash -n launch/slurm.sh
	$(BIN)/python docs/settings.py | diff docs/settings.md - || (echo "docs/settings.md is stale: run make docs" && exit 1)

bench: .venv/ready
	$(BIN)/python benchmarks/data_path.py
	$(BIN)/python benchmarks/step.py

# Does everything work on this machine's GPU, and how fast? make gpu_check ARGS="--parts throughput --data DIR"
gpu_check: .venv/ready
	$(BIN)/python -u benchmarks/gpu_check.py $(ARGS)

# The table of benchmarks/results/cifar10.md: real images, three seeds. Needs CARE_SHARED_DATA or ../shared/data.
cifar10: .venv/ready
	$(BIN)/python -u benchmarks/cifar10.py

docs: .venv/ready
	$(BIN)/python docs/settings.py > docs/settings.md

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		(echo "error: $(PYTHON) is $$($(PYTHON) --version); expected Python 3.11 or newer. Use make PYTHON=python3.11" && exit 1)
	@echo "setting up .venv: about 3 GB to download on a new machine, half a minute to install when cached"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

# Newer versions within pyproject.toml's ranges: delete a line of requirements.txt (or the file), then `make pins`.
pins: .venv/ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url \
		--no-emit-find-links --custom-compile-command "make pins" pyproject.toml -o requirements.txt
