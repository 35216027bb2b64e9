# Every target first makes what it needs, the environment in .venv included. `make` alone lists the targets.

ARGS ?=
PROMPT ?= ROMEO:
RUN ?= elara
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt
CORE := .venv/.core
MADE := .venv/.made
DEV := .venv/.dev
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup data train sweep search report sample verify evaluate export collect bench test test-all test-long counterparts lint clean distclean force
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  ARGS="..." passes Hydra overrides, as in: make train ARGS="model=elara_tiny trainer.max_steps=100"'
	@echo '  PYTHON=... names the interpreter for .venv; default: the first of python3, python3.13, .12, .11 that is >= 3.11'

setup: $(DEV) ## install everything for development into .venv

data: $(CORE) ## fetch and prepare the training data
	@$(PY) -m elara.data $(ARGS)

train: $(CORE) ## train Elara: the quick run, minutes on a CPU
	@$(PY) -m elara.train $(ARGS)

sweep: $(CORE) ## train every combination of ARGS="moe=none,deepseek seed=1,2", a process each, into one table
	@$(PY) -m elara.train -m $(ARGS)

search: $(DEV) ## search for the best overrides: ARGS="search=lr"
	@$(PY) -m elara.sweep $(ARGS)

report: $(CORE) ## make one HTML page of a run, sweep or search: RUN=outputs/train/elara/...
	@$(PY) -m elara.report $(RUN)

# Hydra reads a quoted value: backslashes before a quote are doubled, quotes and interpolations are escaped.
sample: $(CORE) ## let the newest trained model go on from PROMPT="ROMEO:"
	@prompt=$$(printf '%s' "$$ELARA_PROMPT" | sed -E -e "s/(\\\\*)('|\$$)/\1\1\2/g" -e "s/'/\\\\'/g" -e 's/\$$\{/\\$${/g'); \
	$(PY) -m elara.sample "prompt='$$prompt'" $(ARGS)
sample: export ELARA_PROMPT := $(value PROMPT)

verify: $(CORE) ## count parameters, bytes and memory of a model and check that it trains
	@$(PY) -m elara.verify $(ARGS)

evaluate: $(CORE) ## measure how good the newest trained model is, or those of ARGS="checkpoint=[a,b]"
	@$(PY) -m elara.evaluate $(ARGS)

export: $(DEV) ## write the newest trained model as a file for llama.cpp: ARGS="quantize=Q4_K_M"
	@$(PY) -m elara.export $(ARGS)

collect: $(DEV) ## ask teachers and keep what they answer: ARGS="prompts.path=questions.txt teacher=[smollm2]"
	@$(PY) -m elara.collect $(ARGS)

bench: $(CORE) ## measure the promised speed ratios, each beside its reference
	@$(PY) -m elara.bench $(ARGS)

# The tests start hundreds of processes: where this is set, each of them would compile every module anew.
test test-all test-long: export PYTHONDONTWRITEBYTECODE :=

test: $(DEV) ## the fast tests, with the coverage of model and decoding
	@$(PY) -m pytest -m "not slow and not long" $(PARALLEL) --cov --cov-report=term

test-all: test counterparts ## the fast tests, then the slow ones and those with a real counterpart
	@$(PY) -m pytest -m "slow and not long" $(PARALLEL)

test-long: $(DEV) ## further cases of slow tests, and 200 random ways through resuming
	@$(PY) -m pytest -m long $(PARALLEL)

# Programs that the tests compare with. Where one cannot be installed, the tests that need it say so and are skipped.
counterparts:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && echo "Installing Chromium ..." && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } \
	    || echo "note: no chromium, and it cannot be installed here: tests of pages are skipped" >&2
	@{ command -v npm >/dev/null && npm install --silent --ignore-scripts --no-audit --no-fund --prefix .counterparts \
	    @node-llama-cpp/linux-x64@3.22.1 >/dev/null; } \
	    || echo "note: llama.cpp's library cannot be installed by npm here: tests against it are skipped" >&2
	@$(PIP) xllamacpp==2026.10.11549 2>/dev/null \
	    || echo "note: xllamacpp cannot be installed here: tests of its server are skipped" >&2
	@{ test -x .counterparts/ollama-proxy/bin/ollama-proxy || { $(PY) -m venv .counterparts/ollama-proxy \
	    && .counterparts/ollama-proxy/bin/python -m pip install -qq --no-input --disable-pip-version-check \
	    ollama-proxy-plus==0.1.0; }; } 2>/dev/null \
	    || echo "note: ollama-proxy-plus cannot be installed here: tests of Ollama's API against it are skipped" >&2

lint: $(DEV) ## ruff, mypy and the rules of import
	@$(PY) -m ruff check
	@$(PY) -m mypy
	@$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo

clean: ## remove caches and build products (data/ and outputs/ stay)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## remove what make counterparts installed, and .venv if make made it, as well
	@rm -rf .counterparts
	@if [ "$$(cat $(MADE) 2>/dev/null)" = "$(CURDIR)" ]; then rm -rf .venv; \
	elif [ -e .venv ]; then echo "note: .venv stays: make did not make it in this folder" >&2; fi

# The stamp is written last and names this folder: an interrupted installation and a copied checkout are installed anew,
# a changed pyproject.toml or constraints.txt is brought up to date in place. Torch comes first, by its exact version,
# so that pip never weighs other builds of it. A .venv of somebody else's is used if it works, and never deleted: only
# what $(MADE), written first, says to be of make's own making in this folder is replaced when it does not work.
ifneq "$(shell cat $(CORE) 2>/dev/null)" "$(CURDIR)"
$(CORE): force
endif

$(CORE): pyproject.toml constraints.txt
	@if ! $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)' 2>/dev/null; then \
	    if { [ -e .venv ] || [ -L .venv ]; } && [ "$$(cat $(MADE) 2>/dev/null)" != "$(CURDIR)" ]; then \
	        echo "error: .venv was not made by make and is no environment of Python >= 3.11 with pip that works: move it away, and make makes another one" >&2; \
	        exit 1; \
	    fi; \
	    for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	        "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	        python=; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "error: no Python >= 3.11 with the venv module among $(or $(PYTHON),python3 python3.13 python3.12 python3.11): install one, or name it with PYTHON=..." >&2; \
	        exit 1; \
	    fi; \
	    echo "Making .venv with $$("$$python" --version) ..."; \
	    rm -rf .venv && mkdir .venv && echo "$(CURDIR)" > $(MADE) && "$$python" -m venv .venv; \
	fi
	@echo "Installing PyTorch, the largest download ..."
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@echo "Installing Elara and what it needs ..."
	@$(PIP) -e .
	@echo "$(CURDIR)" > $@

$(DEV): $(CORE)
	@echo "Installing the tools for development ..."
	@$(PIP) -e '.[dev]'
	@touch $@
