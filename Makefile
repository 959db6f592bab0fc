# make demo: the mini world from nothing to scored reconstructions.  make test: the test suite.  Both set up what is missing.
PYTHON := .venv/bin/python
IMAGE ?= percept

.PHONY: setup demo test lab lint notebooks gallery build push
setup:
	@bash setup.sh

demo: setup  ## prepare, train, reconstruct, retrieve and score on the mini world (nine to ten minutes on two cores)
	@$(PYTHON) run.py mindeye --mini

test: setup  ## a file of tests at a time on each of up to four cores
	@$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile

lab: setup  ## JupyterLab with the mini recipe selected
	@PERCEPT_RECIPE=mindeye/mini .venv/bin/jupyter lab notebooks

lint: setup
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy

notebooks: setup  ## remake the .py exports from the notebooks
	@.venv/bin/jupytext --quiet --to py:percent --opt notebook_metadata_filter=-all --opt cell_metadata_filter=tags,-all notebooks/*.ipynb

gallery: demo  ## remake docs/gallery from the executed notebooks of six recipes, of their comparison and of a sweep
	@for recipe in combined basic_ae roi_voting mindeye2_small mindeye_retrieval; do $(PYTHON) run.py $$recipe --mini || exit 1; done
	@$(PYTHON) run.py compare && $(PYTHON) run.py sweep launch/sweeps/roi_sets_mini.yaml
	@$(PYTHON) tools/make_gallery.py $(addprefix results/,mindeye-mini-subj01 combined-mini-subj01 basic_ae-mini-subj01 roi_voting-mini-subj01 mindeye2_small-mini-subj01 mindeye_retrieval-mini-subj01 compare roi_sets_mini)

build:
	docker build -t $(IMAGE) .

push: build
	docker push $(IMAGE)
