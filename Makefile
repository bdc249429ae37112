# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
EXTRAS ?= cpu,test
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-slow gpu lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/scm-export demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# The tests that take minutes. There are none yet, so pytest ends with exit code 5.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# On a machine with a CUDA GPU: the tests that need it, and every engine's speed as one JSON file.
# TensorRT-RTX comes with `test`; for TensorRT too: make gpu EXTRAS=gpu,test,tensorrt.
gpu: EXTRAS = gpu,test
gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py --json gpu.json

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Made once, and again when what it is made from changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("scm-sdk needs Python 3.10 or later" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
