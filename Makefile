# Every target does its own set-up: a virtual environment in .venv with what constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := benchmarks/peers/.venv

.PHONY: setup demo test ui bench

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt rsft_pipeline/decoding/cpu_attention.c
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
	$(BIN)/pytest -n 2 --dist worksteal

ui: setup
	$(BIN)/rsft ui

# Every number of docs/benchmarks but a GPU's. Takes an hour on 2 cores, and wants them for itself.
bench: setup $(PEERS)/installed
	$(BIN)/python -m benchmarks.sampling --ways shared_prefix generate generate_each
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sampling mixed-prompts --turns 2 --ways shared_prefix generate \
		--out docs/benchmarks/one-thread
	$(BIN)/python -m benchmarks.sampling t5-small t5-small-uneven --turns 2 --ways shared_prefix plain_loop generate \
		--out docs/benchmarks/seq2seq
	$(BIN)/python -m benchmarks.policies
	$(BIN)/python -m benchmarks.until
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training one-of-a-prompt four-of-a-prompt --turns 3 \
		--peers $(PEERS)/bin/python
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training large-vocabulary --turns 3 --ways ours trainer trl \
		--peers $(PEERS)/bin/python --out docs/benchmarks/large-vocabulary
	$(BIN)/python -m benchmarks.round
	$(BIN)/python -m benchmarks.round --prompts 20000 --turns 3 --out docs/benchmarks/more-prompts
	$(BIN)/python -m benchmarks.round --prompts 20000 --turns 2 --set model.bootstrap.steps=200 \
		model.bootstrap.config.hidden_size=512 model.bootstrap.config.intermediate_size=1536 \
		model.bootstrap.config.num_hidden_layers=4 --out docs/benchmarks/larger-round
	$(BIN)/python -m benchmarks.round --prompts 1000 --turns 4 --set model.bootstrap.steps=60 \
		model.bootstrap.config.hidden_size=1024 model.bootstrap.config.intermediate_size=2816 \
		model.bootstrap.config.num_hidden_layers=8 model.bootstrap.learning_rate=0.0005 --out docs/benchmarks/larger-model
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.audit

$(PEERS)/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@
