# make book   sets up .venv, executes the notebooks, renders the book to _build/html/index.html
# make test   sets up what it needs, runs the tests
PYTHON ?= python3
PROFILE ?= book
NOTEBOOK ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.PHONY: setup book test lint train clean

setup: $(STAMP)

# torch first and by its exact version: a CPU build that is at hand is taken as it is.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; call make with PYTHON=python3.12, say")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,dev,data]"
	touch $(STAMP)

book: $(STAMP)
	$(BIN)/python book/build.py --profile $(PROFILE) $(if $(NOTEBOOK),--notebook $(NOTEBOOK))

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The shipped weights: the embedded corpus and, where LANCE_DATA is set, the public training rows.
train: $(STAMP)
	$(BIN)/lance train -o lance/pretrained/default

clean:
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache
