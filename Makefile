# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
# What pip installs is held to this file; `make lock` writes it.
CONSTRAINTS ?= constraints.txt
ifeq ($(filter gpu,$(MAKECMDGOALS)),)
EXTRAS ?= cpu,test
else
EXTRAS ?= gpu,test,tensorrt
endif
VENV   ?= .venv
BIN    := $(VENV)/bin
# Whole files to each of a few processes: a file's tests share what is slow to make.
# Interpreters of test-lowest and test-latest.
OLDEST ?= python3.10
NEWEST ?= python3
SHARED := -n auto --maxprocesses 4 --dist loadfile
READY  := $(VENV)/.ready-$(EXTRAS)

.PHONY: demo test test-slow test-hostile test-matrix test-lowest test-latest gpu lint lock clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/scm-export demo

test: $(READY)
	$(BIN)/python -m pytest $(SHARED)

# What takes minutes: engines of every precision for every GPU, every fault in every graph, distillation at full length,
# and the README as written.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Thousands of damaged and forged files, commands killed at any moment, threads, odd machines: one table of counts.
# SCM_HOSTILE_DAMAGES, _KILLS and _CALLS make it shorter or longer, _SEED chooses other cases.
test-hostile: $(READY)
	$(BIN)/python -m pytest -m hostile -s tests/hostile --hostile-json benchmarks/results/hostile.json

# The two ends of what pyproject.toml allows, each in an environment of its own: the oldest release of every direct
# dependency on the oldest Python, and the newest of everything on the newest Python that is installed.
test-lowest:
	$(MAKE) test VENV=.venv-lowest PYTHON="$(OLDEST)" CONSTRAINTS=constraints-lowest.txt

test-latest:
	rm -f .venv-latest/.ready*
	$(MAKE) test VENV=.venv-latest PYTHON="$(NEWEST)" CONSTRAINTS=/dev/null PIP_OPTIONS="--upgrade --upgrade-strategy eager"

# The default tests under the conditions of other machines: kernels, threads, order, seeds, locale, user, path.
test-matrix: $(READY)
	$(BIN)/python tests/matrix.py

# On a machine with a CUDA GPU: the tests that need it, and every engine's speed as one JSON file. It is measured
# whatever the tests say; the command still ends as they did. A flavour that does not fit the GPU is skipped.
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu; tests=$$?; $(BIN)/python benchmarks/gpu.py --json gpu.json && exit $$tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Write constraints.txt (the newest release of everything that every set of extras installs, for each supported Python
# and system) and constraints-lowest.txt (the oldest that pyproject.toml allows, on the oldest Python).
RESOLVE = UV_PYTHON_DOWNLOADS=never .venv-lock/bin/uv pip compile --quiet --no-config --no-emit-index-url --no-annotate \
	--custom-compile-command "make lock" --python-version 3.10 --upgrade pyproject.toml

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.9
	$(RESOLVE) --universal --constraint constraints.in --output-file constraints.txt \
		--extra cpu --extra gpu --extra tensorrt --extra bench --extra test --group dev
	$(RESOLVE) --universal --resolution lowest-direct --output-file constraints-lowest.txt --extra cpu --extra test

# Made once for a set of extras, and again when what it is made from changes. Of onnxruntime and onnxruntime-gpu only
# one may be there, since they fill the same folder: both go before another set comes.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 15) or sys.exit("scm-sdk needs Python 3.10 to 3.14, found %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready*
	$(BIN)/python -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_OPTIONS) 'setuptools>=77'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_OPTIONS) --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) .venv-lock .venv-lowest .venv-latest build dist *.egg-info
