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

# An environment that came here from another folder holds that folder's path in every script: make it again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help setup lock demo lifecycle test test-unit check format bench prove clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: $(STAMP) ## every test but the long proofs and the GPU's
	@$(PYTEST) $(PARALLEL) -m "not prove and not gpu" tests $(ARGS)

test-unit: $(STAMP) ## the quick tests, under 30 seconds
	@$(PYTEST) $(PARALLEL) -m "not slow and not prove and not gpu" tests/unit tests/project $(ARGS)

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

prove: $(STAMP) ## the long proofs: every kill, soaks
	@$(PYTEST) -m "prove and not gpu" tests $(ARGS)

clean: ## remove caches and built files; keeps .venv and runs/
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
