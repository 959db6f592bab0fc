# make demo: the mini world from nothing to scored reconstructions.
# make test: the fast tests; make test-slow: the others.  All set up what is missing.
PYTHON := .venv/bin/python
IMAGE ?= percept
PYTEST := $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes --no-header pyproject.toml
EXPORT := .venv/bin/jupytext --quiet --to py:percent --opt notebook_metadata_filter=-all --opt cell_metadata_filter=tags,-all

.PHONY: setup setup-all demo test test-slow lab lint format notebooks gallery lock build push
setup:
	@bash setup.sh

setup-all:
	@bash setup.sh --all

demo: setup  ## prepare, train, reconstruct, retrieve and score on the mini world
	@$(PYTHON) run.py percept --mini

test: setup-all  ## the fast tests, a file at a time on each of up to four cores
	@$(PYTEST) -m "not slow"

test-slow: setup-all  ## whole recipes, interrupted runs, browsers, Slurm, DeepSpeed
	@$(PYTEST) -m slow

lab: setup  ## JupyterLab with the mini recipe selected
	@PERCEPT_RECIPE=percept/mini .venv/bin/jupyter lab notebooks

lint: setup-all  ## style, format, types, and how much a reader has to hold in the head
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) tools/readability.py --check

format: setup-all
	@$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

notebooks: setup-all  ## remake the .py exports from the notebooks
	@$(EXPORT) notebooks/*.ipynb

gallery: demo  ## remake docs/gallery from the executed notebooks of seven recipes, a comparison and a sweep
	@for recipe in mindeye combined basic_ae roi_voting mindeye2_small mindeye_retrieval; do $(PYTHON) run.py $$recipe --mini || exit 1; done
	@$(PYTHON) run.py compare && $(PYTHON) run.py sweep launch/sweeps/roi_sets_mini.yaml
	@$(PYTHON) tools/make_gallery.py $(addprefix results/,percept-mini-subj01 mindeye-mini-subj01 combined-mini-subj01 basic_ae-mini-subj01 roi_voting-mini-subj01 mindeye2_small-mini-subj01 mindeye_retrieval-mini-subj01 compare roi_sets_mini)

lock:  ## write the exact versions anew, as far as pyproject.toml asks for others
	@$(COMPILE) --output-file requirements.lock
	@$(COMPILE) --extra dev --output-file requirements-all.lock

build:
	docker build -t $(IMAGE) .

push: build
	docker push $(IMAGE)
