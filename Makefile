# Every target does its own set-up: a virtual environment in .venv with what constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test ui

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt rsft_pipeline/cpu_attention.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rsft-pipeline needs Python 3.11 or newer; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit,embeddings,lora,math,test]'
	@touch $@

demo: setup
	$(BIN)/rsft run arithmetic --rounds 3

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2

ui: setup
	$(BIN)/rsft ui
