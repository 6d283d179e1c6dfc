# GRACE: every command a newcomer needs. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

CONFIG ?= configs/toy.yaml
VENV ?= .venv
# More options for pip. Without a GPU, the small build of torch comes with
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Versions to install; requirements-gpu.lock is for machines with NVIDIA GPUs.
LOCK ?= requirements.lock
# More options for pytest, such as ARGS="-k quantization -x".
ARGS ?=

PY := $(VENV)/bin/python
# An environment is up to date when it was made from these very files.
INSTALLED := $(VENV)/.installed-$(shell cat $(LOCK) pyproject.toml | sha256sum | cut -c1-16)

.PHONY: help
help: ## List the commands
	@echo "Usage: make COMMAND [CONFIG=$(CONFIG)] [PIP_ARGS=...] [ARGS=...]"; echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | \
		while IFS=$$'\t' read -r name text; do printf '  %-14s%s\n' "$$name" "$$text"; done
	@echo; echo 'No GPU? Give PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" once.'

.PHONY: demo
demo: setup ## Run the whole pipeline on CONFIG through Prefect, and show the results (ARGS="--set seed=3")
	$(PY) -m demo run $(CONFIG) $(ARGS)

.PHONY: ui
ui: setup ## Serve Prefect and MLflow, to browse what ran
	$(PY) -m demo ui

.PHONY: test
test: setup ## Run the tests (ARGS="-k name" for some); no network is used
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2 --dist loadfile $(ARGS)

.PHONY: chaos
chaos: setup ## Run the pipeline while things fail (root, for a small disk; ARGS="--seed 7"): 15 to 25 minutes
	HF_HUB_OFFLINE=1 $(PY) -m tests.chaos $(ARGS)

.PHONY: slurm-test
slurm-test: setup ## Run trainings on a real SLURM cluster on this machine (root, minutes)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m slurm tests/test_slurm_launch.py tests/test_slurm_training.py $(ARGS)

.PHONY: lint
lint: setup ## Check style and types, as the pre-commit hooks and the CI do
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.PHONY: format
format: setup ## Put imports in order and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: setup
setup: $(INSTALLED) ## Make the virtual environment and install the locked versions

$(INSTALLED):
	@python=; for candidate in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer is needed; install it, or name it: make setup PYTHON=..." >&2; \
		exit 1; fi; \
	if [ ! -x $(PY) ]; then echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV); fi
	$(PY) -m pip install $(PIP_ARGS) -r $(LOCK)
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	$(PY) -m pip check
	@rm -f $(VENV)/.installed-*
	@touch $@

.PHONY: system-deps
# chromium     tests that open the Prefect and MLflow pages
# postgresql   tests with Prefect's database on a server
# git          the commit that every artifact records
# slurm-wlm    training jobs on a SLURM cluster, with munge
system-deps: ## Install the system packages that some tests need (root or sudo; Debian)
	@missing=; \
	for need in chromium:chromium pg_lsclusters:postgresql git:git slurmctld:slurm-wlm munged:munge; do \
		PATH=$$PATH:/usr/sbin command -v "$${need%%:*}" >/dev/null || missing+=" $${need##*:}"; done; \
	if [ -z "$$missing" ]; then echo "All system packages are there."; exit 0; fi; \
	run=; if [ "$$(id -u)" != 0 ]; then run="sudo -n"; fi; \
	if [ -n "$$run" ] && ! sudo -n true 2>/dev/null; then \
		echo "Missing:$$missing. Ask an administrator for: apt-get install$$missing" >&2; exit 1; fi; \
	set -x; $$run apt-get -o Acquire::http::Timeout=20 update -q; \
	$$run env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing

.PHONY: toy-weights
toy-weights: setup ## Make assets/toy again from random weights (minutes on a GPU, a day on 2 cores)
	for role in teacher student; do \
		rm -rf runs/toy-weights/$$role runs/toy-weights/$$role.partial; mkdir -p runs/toy-weights; \
		$(VENV)/bin/grace toy pretrain $$role runs/toy-weights/$$role; done
	for role in teacher student; do \
		rm -rf assets/toy/$$role; mv runs/toy-weights/$$role assets/toy/$$role; done

.PHONY: clean
clean: ## Remove caches and build leftovers; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis mlruns
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove the environment and all runs too
	rm -rf $(VENV) runs
