# `make` lists the targets. Times are for two CPU cores.
# The first Python 3.11 to 3.13 that really runs (a version manager's stub may not).
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# One torch thread a process: two busy threads on two busy cores are many times slower than one.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup lab demo demo-box test test-slow gallery docs bench gpu lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## install everything into .venv (2 min)

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "misa needs Python 3.11, 3.12 or 3.13; install one, or: make PYTHON=path/to/python3.12"; exit 1; }
	@echo "setup 1 of 3: a virtual environment in $(VENV) (seconds)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2 of 3: torch, mmdet, JupyterLab and what else constraints.txt lists (7 GB, 2 minutes if all is quiet)"
	@if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	  $(BIN)/pip install $$quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[notebooks,photos,docs,dev]'
	@echo "setup 3 of 3: compile the operations for this processor (ten seconds)"
	@$(BIN)/python -c "from misa.ops.backends.choice import warm; warm()"
	@touch $@

lab: setup  ## the notebooks in JupyterLab, as copies in runs/notebooks, which git does not track
	@mkdir -p runs/notebooks
	@for book in notebooks/*.ipynb; do [ -e runs/$$book ] || cp $$book runs/$$book; done
	$(BIN)/jupyter lab runs/notebooks

demo: setup  ## MISA, teacher and student: train, score and draw from the notebook into runs/demo-long-seed0 (7 min)
	$(call train_notebook,demo:long,runs/demo-long-seed0)

demo-box: setup  ## the short one, boxes and color alone, into runs/demo-box-seed0 (less than half the time)
	$(call train_notebook,demo:box,runs/demo-box-seed0)

define train_notebook
@mkdir -p $(2)
$(BIN)/python -m papermill notebooks/train.ipynb $(2)/train.ipynb --log-output --no-progress-bar \
  --execution-timeout 7200 -p row $(1) -p work_dir $(2) -p interactive False
@echo "The executed notebook is $(2)/train.ipynb; its figures are in $(2)/figures. Now: misa inspect $(2)"
endef

test: setup  ## the default tests (5 min)
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: setup  ## the long tests: notebooks, real networks (12 min)
	$(BIN)/python -m pytest -q -n 2 -m slow

gallery: setup  ## all notebooks executed, as pages in runs/gallery (SMOKE=1: a few minutes; else what is not trained yet is trained)
	$(BIN)/python -m misa gallery $(if $(SMOKE),--smoke)

docs: setup  ## the documentation as a site in build/docs, with the notebooks executed (2 min)
	@ls runs/gallery/train.html >/dev/null 2>&1 || ls runs/gallery-smoke/train.html >/dev/null 2>&1 || $(MAKE) gallery SMOKE=1
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/docs/index.html"

bench: setup  ## propagation against the plain form, on COCO images (DATA=path/to/coco; 5 min, nothing else running)
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.propagation $(if $(DATA),--data $(DATA))

gpu: setup  ## checks, measures, tests and trains on a CUDA device, report in runs/gpu (not yet timed)
	$(BIN)/python -m benchmarks.gpu

lint: setup  ## ruff and mypy (1 min)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## remove the environment and caches, not runs/ and datasets/ (1 s)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
