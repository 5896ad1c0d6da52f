# `make demo` and `make test` work on a bare machine with Python 3.11+; both cost nothing to repeat.
# Variables: PYTHON=python3.11  VENV=.venv  PYTORCH_INDEX=<where torch's CPU build is, if pip does not see it>

export PATH := $(or $(PATH),/usr/local/bin:/usr/bin:/bin)
VENV ?= .venv
VENV4 ?= .venv4
BIN := $(VENV)/bin
PY := $(BIN)/python
PYTHON ?=
PYTORCH_INDEX ?=
ARGS ?=
install = $(if $(PYTHON),PYTHON=$(PYTHON)) $(if $(PYTORCH_INDEX),PYTORCH_INDEX=$(PYTORCH_INDEX)) \
	bash requirements/install.sh $(VENV)
pytest = OMP_NUM_THREADS=1 $(PY) -m pytest -q
# Two at a time: most tests wait for processes they started. Files stay whole, since their fixtures are dear.
JOBS ?= 2
in_parallel = -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help venv venv-test demo demo-quick test test-fast test-slow test-gpu-path test-families test-transformers4 test-kill test-disk test-kill-run check format docs completions wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

venv: ## the environment to run gad in
	@$(install) run

venv-test: ## the same with the tools for development
	@$(install) test

demo: venv ## the three stages on the embedded default, with a before/after table (ARGS=--quick for a short one)
	$(BIN)/gad demo $(ARGS)

demo-quick: venv ## the demo in under three minutes
	$(BIN)/gad demo --quick

test: venv-test ## all tests (JOBS=2 at a time)
	$(pytest) $(in_parallel) $(ARGS)

test-fast: venv-test ## tests without the slow ones (real inference engines, many processes)
	$(pytest) $(in_parallel) -m "not slow" $(ARGS)

test-gpu-path: venv-test ## whole 8B models through the emulated GPU path (minutes)
	GAD_GPU_PATH=1 $(pytest) tests/gpu_path $(ARGS)

test-slow: venv-test ## only the slow ones
	$(pytest) $(in_parallel) -m slow $(ARGS)

test-transformers4: venv-test ## merged folders read by transformers 4, in an environment of its own (VENV4=.venv4)
	[ -x $(VENV4)/bin/python ] || $(BIN)/python -m venv $(VENV4)
	$(VENV4)/bin/python -m pip --disable-pip-version-check install -q --no-deps \
		-r requirements/torch.txt $(if $(PYTORCH_INDEX),--index-url $(PYTORCH_INDEX))
	$(VENV4)/bin/python -m pip --disable-pip-version-check install -q transformers==4.57.6 sympy networkx jinja2
	GAD_TEST_TRANSFORMERS4=$(VENV4)/bin/python $(pytest) tests/merge/test_transformers4.py

test-families: venv-test ## the matrix of docs/families.md: every family, with vLLM too
	GAD_FAMILIES=all $(pytest) tests/families $(ARGS)

test-kill: venv-test ## kill -9 a saving run 100 times (KILLS=100): nothing committed may be lost
	rm -rf .test-kill
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests $(PY) tests/checkpoint/kill_loop.py .test-kill $(or $(KILLS),100)
	rm -rf .test-kill

test-disk: venv-test ## let strace fill the disk of 25 whole runs (CASES=25): exit 6, and the resumed run is the whole one
	rm -rf .test-faults
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests $(PY) tests/checkpoint/fault_loop.py .test-faults disk $(or $(CASES),25)
	rm -rf .test-faults

test-kill-run: venv-test ## kill -9 the parent or a rank of 25 whole runs (CASES=25): the same
	rm -rf .test-faults
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests $(PY) tests/checkpoint/fault_loop.py .test-faults kill $(or $(CASES),25)
	rm -rf .test-faults

check: venv-test ## style, types, import rules, drift of generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PY) docs/generate.py --check
	$(pytest) tests/test_imports.py

format: venv-test ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs completions: venv ## write docs/cli.md, docs/config.md, docs/metrics.md and completions/ anew
	$(PY) docs/generate.py

wheel: venv ## build a wheel into dist/
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps -w dist .

clean: ## remove what can be made again (not runs/)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
