# make quickstart   set up, then distil three teachers into a small student, on the CPU, in minutes
# make test         set up, then run the tests
# make check        formatting, lint, types
# make models.json  count the models again: the table of zoo list, after a change of a family
# make clean        remove the environment
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICKSTART := runs/quickstart

.PHONY: quickstart test test-fast check models.json clean
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
	@touch $@

quickstart: $(READY)
	@rm -rf $(QUICKSTART)
	@echo "Distilling three teachers into eradio_nano, with a second student for comparison; about four minutes on two cores."
	@$(BIN)/zoo distill quickstart --out $(QUICKSTART)

test: $(READY)
	@echo "Running the tests; GPU tests are skipped where there is no GPU."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-fast: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

models.json: $(READY)
	$(BIN)/python -m zoo.commands.model_table

clean:
	rm -rf $(VENV)
