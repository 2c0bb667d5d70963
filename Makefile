# TORCH picks the torch to install first, e.g. TORCH=torch==2.13.0 or TORCH="torch --index-url URL".
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
BIN = $(VENV)/bin

.PHONY: help setup test quick check demo bench docs dist fresh bounds clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

setup: $(BIN)/.ready  ## a virtual environment with everything installed

# Without the start-up hook, so that the tests import the package first, with checks of shapes on it.
# Tests run side by side: the threads of their child processes would wait for each other. Three
# workers keep two cores busy: one of them waits for SLURM for minutes. Bytecode is kept even where
# the environment forbids it: every process of the tests would compile the package again.
TEST = LM_EVAL_COUPLING_NO_HOOK=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python
test: setup  ## run all tests
	$(TEST) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

QUICK_TESTS = $(addprefix tests/,jacobians measures measuring numerics saved statistics fit sweep \
	test_language.py test_structure.py)
quick: setup  ## run the fast tests, for a change in progress
	$(TEST) -m pytest -q -n 2 --dist loadfile -m "not slow" $(QUICK_TESTS)

check: setup  ## lint, types, workflows and citation
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

demo: setup  ## evaluate a small real model, measure its coupling, draw the picture
	$(BIN)/lm-eval-coupling demo

QUICK = $(if $(BENCH_FULL),,--quick)
bench: setup  ## speed and memory of MODEL=DIR, a transformers folder; BENCH_FULL=1 takes hours instead of minutes
	$(if $(MODEL),,$(error got no MODEL, expected make bench MODEL=DIR with a transformers folder))
	$(BIN)/python tests/benchmarks/against_release.py --model $(MODEL) $(QUICK)
	$(BIN)/python tests/benchmarks/floors.py --model $(MODEL) $(QUICK)
	$(BIN)/python tests/benchmarks/growth.py $(QUICK)
	$(BIN)/python tests/benchmarks/memory.py --model $(MODEL) $(QUICK)
	$(BIN)/python tests/benchmarks/plot.py

docs: setup  ## build the site into site/, refusing broken links
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: setup  ## build the source archive, and the wheel from it, into dist/; check both
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

fresh: dist  ## the wheel alone in a new environment: seconds to the picture of the demo
	$(BIN)/python tests/benchmarks/fresh_install.py --wheel dist/*.whl --torch "$(TORCH)"

# The tests that touch what other packages offer, in an environment of its own. The newest ignores our upper bounds.
# BOUNDS_TESTS=tests/test_internals.py takes seconds: is every name inside lm-eval and TransformerLens still there?
RESOLUTION ?= lowest
BOUNDS_TESTS ?= $(addprefix tests/,test_internals.py test_bounds.py harness jacobians residual saved statistics)
NEWEST = $(filter newest,$(RESOLUTION))
BOUNDS_PYTHON = .venv-$(RESOLUTION)/bin/python
bounds:  ## tests with the lowest or the newest versions of what we need: RESOLUTION=lowest|newest
	$(PYTHON) -m venv --clear .venv-$(RESOLUTION)
	$(BOUNDS_PYTHON) -m pip install --quiet uv $(if $(NEWEST),$(TORCH))
	$(BOUNDS_PYTHON) -m uv pip install --quiet --python $(BOUNDS_PYTHON) $(if $(NEWEST),,--resolution lowest-direct) -e '.[dev]'
	$(if $(NEWEST),$(BOUNDS_PYTHON) -m pip install --quiet --upgrade --pre --no-deps lm-eval transformer-lens transformers)
	$(BOUNDS_PYTHON) -m pip freeze | grep -E '^(lm[-_]eval|numpy|pandas|torch|transformer-lens|transformers)=='
	LM_EVAL_COUPLING_NO_HOOK=1 OMP_NUM_THREADS=1 $(BOUNDS_PYTHON) -m pytest -q -n 2 --dist loadfile $(BOUNDS_TESTS)

clean:  ## remove the virtual environment
	rm -rf $(VENV) .venv-lowest .venv-newest site
