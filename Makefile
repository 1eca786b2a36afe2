# make setup builds .venv with every version pinned; the other targets do it first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# the suite compares runs bit by bit and the machines that run it are shared: one thread a process
export OMP_NUM_THREADS := 1

.PHONY: setup demo test docs lint types battery reliability bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fedkeel needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
		echo "name another one: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev,docs,diffusion,flower,ray,dp,track]'
	@touch $@

demo: setup
	$(BIN)/fedkeel demo

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

# the site, in site/; strict: a broken link is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

battery: setup
	$(BIN)/python tests/battery.py

# about an hour on two quiet cores
reliability: setup
	PYTHONPATH=tests $(BIN)/python benchmarks/reliability.py

# half an hour on two quiet cores
bench: setup
	$(BIN)/python benchmarks/speed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy
