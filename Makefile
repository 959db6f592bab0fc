# make demo: the mini world from nothing to scored reconstructions.
# make test: the fast tests; make test-slow: the others.  All set up what is missing.
PYTHON := .venv/bin/python
IMAGE ?= percept
PYTEST := $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes --no-header pyproject.toml
EXPORT := .venv/bin/jupytext --quiet --to py:percent --opt notebook_metadata_filter=-all --opt cell_metadata_filter=tags,-all

.PHONY: setup setup-all setup-docs demo test test-slow lab lint format notebooks docs docs-executed lock build push
setup:
	@bash setup.sh

setup-all:
	@bash setup.sh --all

setup-docs:
	@bash setup.sh --extra docs

demo: setup  ## prepare, train, reconstruct, retrieve and score on the mini world
	@$(PYTHON) run.py percept --mini

test: setup-all  ## the fast tests, a file at a time on each of up to four cores
	@$(PYTEST) -m "not slow"

test-slow: setup-all  ## whole recipes, interrupted runs, browsers, Slurm, DeepSpeed
	@$(PYTEST) -m slow

lab: setup  ## JupyterLab at the quickstart, with the mini recipe selected for the stages
	@PERCEPT_RECIPE=percept/mini .venv/bin/jupyter lab notebooks/quickstart.ipynb

lint: setup-all  ## style, format, types, and how much a reader has to hold in the head
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) tools/readability.py --check

format: setup-all
	@$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

notebooks: setup-all  ## remake the .py exports from the notebooks
	@$(EXPORT) notebooks/*.ipynb

docs: setup-docs  ## the documentation site in build/site, built without a network
	@$(PYTHON) -m tools.build_docs

docs-executed: demo  ## the same, after running all recipes, so that the notebooks have outputs
	@for recipe in mindeye combined basic_ae roi_voting mindeye2_small mindeye_retrieval; do $(PYTHON) run.py $$recipe --mini || exit 1; done
	@$(PYTHON) run.py compare && $(PYTHON) run.py sweep launch/sweeps/roi_sets_mini.yaml
	@$(MAKE) docs

lock:  ## write the exact versions anew, as far as pyproject.toml asks for others
	@$(COMPILE) --output-file requirements.lock
	@$(COMPILE) --extra dev --output-file requirements-all.lock

build:
	docker build -t $(IMAGE) .

push: build
	docker push $(IMAGE)
