# Everything a person or a machine runs here. `make` alone lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
# Two test processes, one file at a time each, one arithmetic thread each: on two cores faster than one process with two.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -q
PARALLEL := -n $(WORKERS) --dist loadfile
ARGS ?=
NOT_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 || echo " and not gpu")

# An environment that came here from another folder holds that folder's path in every script: make it again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help setup lock demo lifecycle test test-unit check format bench prove clean
.PHONY: coverage test-e2e-workflow test-e2e-real-model test-e2e-mlx test-e2e-ollama test-e2e-quick test-e2e-all

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv from the pinned lock (once; again when the lock changes)

$(STAMP): locks/requirements.txt locks/mlx.txt locks/setup.sh pyproject.toml
	@locks/setup.sh

lock: ## solve pyproject.toml afresh and pin the result (TORCH=x.y.z moves torch)
	@locks/relock.sh

demo: $(STAMP) ## fine-tune SmolLM2-135M on examples/demo, ask before and after, verify, write runs/demo/report.html
	@$(VENV)/bin/foundry train examples/demo/demo.yaml --resume auto $(ARGS)
	@printf '%s\n' 'Next:' '  open runs/demo/report.html' \
	  '  $(VENV)/bin/foundry chat runs/demo prompt="When was Old Winifred cast?"' \
	  '  $(VENV)/bin/foundry verify run runs/demo      # trains it again and compares every bit' \
	  '  your own data: see README.md'

LIFE := runs/lifecycle
lifecycle: $(STAMP) ## raw text to a chat model: corpus, vocabulary, pretraining, fine-tuning, GGUF; about ten minutes on two cores
	@$(PY) examples/lifecycle/make_corpus.py --out $(LIFE)/corpus.jsonl
	@$(VENV)/bin/foundry tokenizer train $(LIFE)/corpus.jsonl examples/demo/train.jsonl --vocab-size 4096 \
	  --template chatml --max-length 256 --overwrite --out $(LIFE)/tokenizer
	@$(VENV)/bin/foundry train examples/lifecycle/pretrain.yaml --resume auto $(ARGS)
	@$(VENV)/bin/foundry train examples/lifecycle/chat.yaml --resume auto $(ARGS)
	@[ -d $(LIFE)/gguf ] || $(VENV)/bin/foundry export $(LIFE)/chat --to gguf --quant f16 --out $(LIFE)/gguf
	@printf '%s\n' 'Next:' '  open $(LIFE)/base/report.html $(LIFE)/chat/report.html' \
	  '  $(VENV)/bin/foundry chat $(LIFE)/chat prompt="Where does the island of Merrowick lie?"'

test: $(STAMP) ## every test but the long proofs; the GPU's where there is one
	@$(PYTEST) $(PARALLEL) -m "not prove$(NOT_GPU)" tests $(ARGS)

test-unit: $(STAMP) ## the quick tests, under a minute on two cores
	@$(PYTEST) $(PARALLEL) -m "not slow and not prove$(NOT_GPU)" tests/unit tests/project $(ARGS)

# The three tiers. FT_TEST_MODEL and FT_E2E_MODEL_ID name other models; ARGS=--short does fewer steps in the full tiers.
TIERS := $(PY) -m tests.tiers
test-e2e-workflow: $(STAMP) ## tier 1: the whole way on a random model, under 30 seconds
	@$(TIERS) workflow $(ARGS)

test-e2e-real-model: $(STAMP) ## tier 2: a real model improves by five numbers, under 5 minutes; wants FT_REAL_MODEL_ENABLE=1
	@$(TIERS) real-model $(ARGS)

test-e2e-mlx: $(STAMP) ## tier 3 on MLX: an adapter trained and asked there, under 15 minutes
	@$(TIERS) mlx $(ARGS)

test-e2e-ollama: $(STAMP) ## tier 3 on torch: adapter, GGUF, llama.cpp, Ollama where it is, under 15 minutes
	@$(TIERS) ollama $(ARGS)

test-e2e-quick: $(STAMP) ## tiers 1 and 2
	@FT_REAL_MODEL_ENABLE=1 $(TIERS) workflow real-model $(ARGS)

test-e2e-all: $(STAMP) ## every tier; the report is runs/e2e/report.json
	@FT_REAL_MODEL_ENABLE=1 $(TIERS) workflow real-model mlx ollama $(ARGS)

# Share of lines and branches that the tests execute, processes that they start included.
CAREFUL := checkpoint/* config/* rendering/* engine/losses.py
coverage: $(STAMP) ## as test, and what it executes: 85 % of all, 95 % where a fault is silent; build/coverage
	@$(VENV)/bin/coverage erase
	@$(PYTEST) $(PARALLEL) -m "not prove$(NOT_GPU)" --cov --cov-report= tests $(ARGS)
	@$(VENV)/bin/coverage html -q -d build/coverage && $(VENV)/bin/coverage json -q -o build/coverage/coverage.json
	@set -f; for part in $(CAREFUL); do echo "== $$part: at least 95 %"; \
	  $(VENV)/bin/coverage report --include="model_foundry/$$part" --fail-under=95 || exit 1; done
	@echo "== all: at least 85 %"; $(VENV)/bin/coverage report --fail-under=85 | grep '^TOTAL'; exit $${PIPESTATUS[0]}

check: $(STAMP) ## lint, format, types, layering, sizes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 PYRIGHT_PYTHON_GLOBAL_NODE=0 $(PY) -m pyright
	$(PYTEST) tests/project/test_layering.py tests/project/test_sizes.py

format: $(STAMP) ## rewrite the sources as `make check` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP) ## one benchmark: make bench NAME=b1 (no NAME lists them; ARGS="--rounds 5")
	@$(PY) -m benchmarks $(NAME) $(ARGS)

prove: $(STAMP) ## the long proofs: every kill, soaks, faults put into the losses
	@$(PYTEST) -m "prove$(NOT_GPU)" tests $(ARGS)

clean: ## remove caches and built files; keeps .venv and runs/
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
