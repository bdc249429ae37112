# Two commands do all the set-up: `make demo` runs the main job, `make check` every check of a change.
PYTHON ?= python3
# Versions that pip installs; `make lock` writes the file.
CONSTRAINTS ?= constraints.txt
ifeq ($(filter gpu,$(MAKECMDGOALS)),)
EXTRAS ?= cpu,test
else
EXTRAS ?= gpu,test,tensorrt
endif
VENV   ?= .venv
BIN    := $(VENV)/bin
# Interpreters of test-lowest and test-latest.
OLDEST ?= python3.10
NEWEST ?= python3
# Each process gets whole files, because the tests of a file share fixtures that are slow to make.
SHARED := -n auto --maxprocesses 4 --dist loadfile
READY  := $(VENV)/.ready-$(EXTRAS)
DOCS   := build/docs

.PHONY: demo check docs types test test-slow test-hostile test-matrix test-edge run-edge test-lowest test-latest gpu lint lock clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/scm-export demo

# What CI runs: the fast checks first.
check: lint types docs test

test: $(READY)
	$(BIN)/python -m pytest $(SHARED)

# Tests that take minutes: engines of every precision for every GPU, every planted fault in every graph, distillation at
# full length, and the README's commands as printed.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Thousands of damaged and forged files, commands killed at random moments, threads and unusual machines; prints one table.
# SCM_HOSTILE_DAMAGES, _KILLS and _CALLS set its length, _SEED the random cases.
test-hostile: $(READY)
	$(BIN)/python -m pytest -m hostile -s tests/hostile --hostile-json benchmarks/results/hostile.json

# The oldest release of every direct dependency on the oldest Python, and the newest release of every dependency on the
# newest installed Python, each in its own environment.
test-lowest:
	$(MAKE) test VENV=.venv-lowest PYTHON="$(OLDEST)" CONSTRAINTS=constraints-lowest.txt

test-latest:
	rm -f .venv-latest/.ready*
	$(MAKE) test VENV=.venv-latest PYTHON="$(NEWEST)" CONSTRAINTS=/dev/null PIP_OPTIONS="--upgrade --upgrade-strategy eager"

# Exports to the runtimes of phones and embedded machines, in an environment of its own: heavy, and litert-torch needs an
# older typing-extensions than the others.
test-edge:
	$(MAKE) run-edge VENV=.venv-edge EXTRAS=test-edge CONSTRAINTS=constraints-edge.txt

run-edge: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow" tests/export/edge tests/runtimes/test_edge_backends.py

# The default tests under the conditions of other machines: kernels, threads, order, seeds, locale, user, path.
test-matrix: $(READY)
	$(BIN)/python tests/matrix.py

# On a machine with a CUDA GPU: the tests that need it, and the speed of every engine as one JSON file, also after failed
# tests, whose exit code is kept. A flavor that does not fit the GPU is skipped.
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu; tests=$$?; $(BIN)/python benchmarks/speed/gpu.py --json gpu.json && exit $$tests

# The documentation site; open $(DOCS)/index.html. A warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs $(DOCS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Write constraints.txt (the newest releases of all extras, for every supported Python and system) and
# constraints-lowest.txt (the oldest releases that pyproject.toml allows, on the oldest Python).
RESOLVE = UV_PYTHON_DOWNLOADS=never .venv-lock/bin/uv pip compile --quiet --no-config --no-emit-index-url --no-annotate \
	--custom-compile-command "make lock" --python-version 3.10 --upgrade pyproject.toml

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.9
	$(RESOLVE) --universal --constraint constraints.in --output-file constraints.txt \
		--extra cpu --extra gpu --extra tensorrt --extra bench --extra test --group dev
	$(RESOLVE) --universal --constraint constraints.in --output-file constraints-edge.txt --extra test-edge
	$(RESOLVE) --universal --resolution lowest-direct --output-file constraints-lowest.txt --extra cpu --extra test

# Made once for a set of extras, and again when pyproject.toml or the constraints change. onnxruntime and onnxruntime-gpu
# install the same folder, so both are removed before a set of extras is installed.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 15) or sys.exit("scm-sdk needs Python 3.10 to 3.14, found %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready*
	$(BIN)/python -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_OPTIONS) 'setuptools>=77'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_OPTIONS) --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) .venv-edge .venv-lock .venv-lowest .venv-latest build dist *.egg-info
