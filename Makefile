# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
ifeq ($(filter gpu,$(MAKECMDGOALS)),)
EXTRAS ?= cpu,test
else
EXTRAS ?= gpu,test,tensorrt
endif
VENV   ?= .venv
BIN    := $(VENV)/bin
# Whole files to each of a few processes: a file's tests share what is slow to make.
SHARED := -n auto --maxprocesses 4 --dist loadfile
READY  := $(VENV)/.ready-$(EXTRAS)

.PHONY: demo test test-slow gpu lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/scm-export demo

test: $(READY)
	$(BIN)/python -m pytest $(SHARED)

# What takes minutes: engines of every precision for every GPU, every fault in every graph, distillation at full length,
# and the README as written.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# On a machine with a CUDA GPU: the tests that need it, and every engine's speed as one JSON file. It is measured
# whatever the tests say; the command still ends as they did. A flavour that does not fit the GPU is skipped.
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu; tests=$$?; $(BIN)/python benchmarks/gpu.py --json gpu.json && exit $$tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Made once for a set of extras, and again when what it is made from changes. Of onnxruntime and onnxruntime-gpu only
# one may be there, since they fill the same folder: both go before another set comes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("scm-sdk needs Python 3.10 or later" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready*
	$(BIN)/python -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
