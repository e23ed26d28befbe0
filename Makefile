# make demo   the five stages on a generated data set, in about ten minutes on two CPU cores
# make test   all tests
# make lint   ruff and mypy
#
# Both make a virtual environment in .venv with $(PYTHON) if there is none, and install the
# requirements when they have changed. What to type without make: see README.md.

PYTHON ?= python3
# more arguments for pip, for example PIP_FLAGS='--no-index --find-links wheels'
PIP_FLAGS ?=
# more arguments for demo.py and pytest; -n 0 tests in one process, as --pdb needs
ARGS ?=
# processes that test, each a file at a time
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test lint

demo: $(VENV)/.installed
	$(BIN)/python demo.py $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; $(PYTHON) is " + sys.version.split()[0] + ". Choose one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
