# Every command that people and CI run. `make help` lists them.
PYTHON ?= python3
VENV := .venv
# The demonstration needs neither torch nor the test tools: its own, smaller environment, unless the full one is there.
DEMO_VENV := $(if $(wildcard $(VENV)/.installed),$(VENV),.venv-serve)
# A second environment at the other end of what is supported: the newest Python, numpy 2 and tifffile.
NUMPY2_VENV := .venv-numpy2
NUMPY2_PYTHON ?=
PIP_INSTALL := install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := $(VENV)/bin/python
# Three tests at a time on two cores: a third of the time, a test waits for a server or a process that it started. One
# thread each for torch: threads that wait for one another on shared cores only burn them.
AT_A_TIME := -n 3 --dist worksteal
# CI measures coverage, against the floor in pyproject.toml: make test COVERAGE=--cov
COVERAGE ?=
SLIDE ?=
# Names the file of `make bench`: one a kind of machine (processor and instructions, or GPU).
MACHINE ?= $(shell $(RUN) -m staindiffuser.benchmarks.measuring)
OUTPUT ?= demo-output
REFERENCE ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-timing test-numpy2 lint format types docs demo-weights graphs bench bench-full bench-frontier bench-compare verify-gpu clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip $(PIP_INSTALL) --editable '.[client,serve,view,train,dev,docs]'
	@touch $@

.venv-serve/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip $(PIP_INSTALL) --editable '.[client,serve,view]'
	@touch $@

# PyPI's torch is a build with CUDA: 2.5 GB to download, 5 GB on disk. Where PyTorch's own index of CPU builds can be
# reached, name it in PIP_EXTRA_INDEX_URL. Only the files of the server's wheel are used: --no-deps leaves its pin of
# numpy<2 out (the serve extra has no server for Python 3.13).
$(NUMPY2_VENV)/.installed: pyproject.toml constraints-numpy2.txt
	python=$(or $(NUMPY2_PYTHON),$$(.ci/find-python 3.13)) && "$$python" -m venv $(NUMPY2_VENV)
	$(NUMPY2_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-numpy2.txt \
		--editable '.[client,serve,view,train,dev]'
	$(NUMPY2_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0
	@touch $@

install: $(VENV)/.installed  ## make .venv with everything, editable

demo: $(DEMO_VENV)/.installed  ## stain a slide on this machine: SLIDE=path, else a sample; result in demo-output/
	$(DEMO_VENV)/bin/python -m staindiffuser.demo $(if $(SLIDE),--slide '$(SLIDE)') --output '$(OUTPUT)'

test: install lint types  ## all tests but the slow ones, with lint and types
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(AT_A_TIME) $(COVERAGE) -m "not slow and not gpu and not network and not timing"

test-all: install lint types  ## every test that this machine can run
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(AT_A_TIME) -m "not gpu and not network and not timing"

test-timing: install  ## tests that measure wall-clock time; only on an idle machine
	$(RUN) -m pytest -m "timing and not gpu"

test-numpy2: $(NUMPY2_VENV)/.installed  ## unit and integration tests with Python 3.13, numpy 2, newest libraries
	OMP_NUM_THREADS=1 $(NUMPY2_VENV)/bin/python -m pytest $(AT_A_TIME) -m "not slow and not gpu and not network and not timing" \
		tests/unit tests/integration

lint: install  ## ruff (lint, formatting) and the contracts on who may import whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: install  ## let ruff rewrite the formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: install  ## mypy, strict
	$(VENV)/bin/mypy

docs: install  ## the documentation's site, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

demo-weights: install  ## train the demonstration model again (hours on two cores), into runs/
	$(VENV)/bin/staindiffuser simulate tiles --output runs/demo-tiles --count 4000 --seed 11 --val-share 0.03 --test-share 0
	$(VENV)/bin/staindiffuser train --data runs/demo-tiles --output runs/demo-first --preset demo --name demo --trained-on 'simulated tissue'
	$(VENV)/bin/staindiffuser train --data runs/demo-tiles --output runs/demo --config checkpoints/demo/longer.toml --name demo --trained-on 'simulated tissue' \
		--resume runs/demo-first/snapshots/last.ckpt
	$(VENV)/bin/staindiffuser train --data runs/demo-tiles --output runs/demo-wider --config checkpoints/demo/wider.toml --name demo --trained-on 'simulated tissue' \
		--from runs/demo/checkpoint
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node 2 $(VENV)/bin/staindiffuser train --data runs/demo-tiles --output runs/demo-germinal \
		--config checkpoints/demo/wider.toml --steps 6600 --name demo-teacher --trained-on 'simulated tissue' --from runs/demo-wider/checkpoint
	$(VENV)/bin/staindiffuser simulate tiles --output runs/more-tiles --count 8000 --seed 12 --val-share 0.02 --test-share 0
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node 2 $(VENV)/bin/staindiffuser train --data runs/more-tiles --output runs/demo-again \
		--config checkpoints/demo/wider.toml --steps 7200 --name demo-teacher --trained-on 'simulated tissue' --from runs/demo-germinal/checkpoint
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node 2 $(VENV)/bin/staindiffuser distill runs/demo-again/checkpoint --data runs/more-tiles \
		--output runs/demo-few --name demo --method e2e --steps 2200 --learning-rate 3e-3
	$(VENV)/bin/staindiffuser distill runs/demo-few/checkpoint --data runs/more-tiles --output runs/demo-white --name demo --method e2e --steps 700 \
		--batch 4 --learning-rate 3e-3 --density-weight 12 --detail-weight 110 --edge-weight 6 --no-search
	$(VENV)/bin/staindiffuser simulate tiles --output runs/unseen --count 1000 --seed 999 --val-share 0 --test-share 0.5
	$(VENV)/bin/staindiffuser distill runs/demo-again/checkpoint --only-gate --student runs/demo-white/checkpoint --no-search --undistilled \
		--data runs/unseen --split test --gate-tiles 500 --output runs/judged
	@echo "copy runs/judged/checkpoint to checkpoints/demo, runs/demo-again/checkpoint to checkpoints/demo-teacher, and run make graphs"

graphs: install  ## export the demonstration model's graphs from its weights; REFERENCE: folders of real tiles that it knows
	$(VENV)/bin/staindiffuser export graphs checkpoints/demo --output checkpoints/demo/graphs
	$(VENV)/bin/staindiffuser simulate tiles --output runs/reference --count 800 --seed 31 --val-share 0 --test-share 0
	$(VENV)/bin/staindiffuser export quality checkpoints/demo/graphs --quantile 0.98 --tiles runs/reference $(addprefix --tiles ,$(REFERENCE))
	$(VENV)/bin/python -m pip $(PIP_INSTALL) 'nncf>=3.4'
	$(VENV)/bin/staindiffuser simulate tiles --output runs/calibration --count 96 --seed 41 --val-share 0 --test-share 0
	$(VENV)/bin/staindiffuser export int8 checkpoints/demo/graphs --tiles runs/calibration $(addprefix --tiles ,$(REFERENCE)) --most 18

bench: install  ## measure this machine's engines (minutes), into benchmarks/results; write the page and its charts
	$(VENV)/bin/staindiffuser bench engines --batch 1,8 --rounds 7 --json benchmarks/results/engines-$(MACHINE).json
	$(VENV)/bin/staindiffuser bench report

bench-full: install  ## the same at batch 1 to 32, with torch.compile (an hour)
	$(VENV)/bin/staindiffuser bench engines --batch 1,2,4,8,16,32 --rounds 9 --compile --json benchmarks/results/engines-$(MACHINE).json
	$(VENV)/bin/staindiffuser bench report

bench-frontier: install  ## quality against time, one step to fifty (minutes), into benchmarks/results; write the page and its charts
	$(VENV)/bin/staindiffuser simulate tiles --output runs/frontier --count 40 --seed 999 --val-share 0 --test-share 0.6
	$(VENV)/bin/staindiffuser bench frontier --tiles runs/frontier --threads 1 --baselines benchmarks/results/baselines.json --json benchmarks/results/frontier-$(MACHINE).json
	$(VENV)/bin/staindiffuser bench report

bench-compare: install  ## this checkout against commit BASE, tile by tile in turns
	$(VENV)/bin/staindiffuser bench compare '$(or $(BASE),$(error name the commit: make bench-compare BASE=HEAD~1))'

verify-gpu:  ## check and measure everything on this NVIDIA GPU, eight minutes; PYTHON has torch with CUDA; ARGS, see docs/gpu.md
	PYTHONPATH=src $(PYTHON) -m staindiffuser.benchmarks.verify_gpu $(ARGS)

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-serve $(NUMPY2_VENV) build dist site demo-output *.egg-info src/*.egg-info
