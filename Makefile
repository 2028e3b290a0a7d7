# One command each; `make help` lists them.
#   RECIPE      the recipe to train, check or evaluate
#   ACCELERATE  the launch config: one of accelerate_configs/*.yaml
#   DATA        rows of your own that no recipe names yet: make check DATA=my.jsonl
#   ARGS        overrides, e.g. ARGS="--learning_rate 1e-6 --margin.preset dpo"
#   PYTHON      an interpreter of your own that has requirements.txt installed; .venv is then neither made nor used
QUICKSTART := recipes/quickstart/dpo.yaml
RECIPE ?= $(QUICKSTART)
ACCELERATE ?= accelerate_configs/cpu.yaml
ARGS ?=
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

ifdef PYTHON
SETUP :=
else
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

LAUNCH = $(PYTHON) recipes/core/runtime/accelerate_launch.py --config_file $(ACCELERATE)
# A recipe's keys say which stage it is of, e.g. conversations_per_update or pairs_per_update (core/runtime/stage.py).
SCRIPT = recipes/$(shell $(PYTHON) recipes/core/runtime/stage.py $(RECIPE)).py

# make itself says nothing of a variable that nobody reads, and would train the quickstart.
LOWER_CASE = $(foreach name,recipe accelerate args python venv data,$(if $(filter command%,$(origin $(name))),$(name)))
ifneq ($(strip $(LOWER_CASE)),)
$(error variables are written in capitals: $(foreach name,$(LOWER_CASE),$(shell echo $(name) | tr a-z A-Z)=…) instead of $(strip $(LOWER_CASE))=…)
endif

.DEFAULT_GOAL := help
.PHONY: help setup train check evaluate real bench keys test test-fast torture style style-check

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(SETUP) ## make .venv from requirements.txt (every other target does it when needed)

$(VENV)/.installed: requirements.txt
	@python3 -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed"'
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	@touch $@

train: $(SETUP) ## train RECIPE; without one, the quickstart: both stages, then a table of before and after
ifeq ($(RECIPE),$(QUICKSTART))
	$(PYTHON) recipes/quickstart/run.py --accelerate_config $(ACCELERATE) $(ARGS)
else
	$(LAUNCH) $(SCRIPT) --config $(RECIPE) $(ARGS)
endif

check: $(SETUP) ## what RECIPE would do and take under ACCELERATE, and what is wrong; of DATA, what would read it
ifdef DATA
	$(PYTHON) recipes/check.py --data "$(DATA)" $(ARGS)
else
	$(PYTHON) recipes/check.py --config $(RECIPE) --accelerate_config $(ACCELERATE) $(ARGS)
endif

evaluate: $(SETUP) ## a checkpoint against preference rows: make evaluate RECIPE=… ARGS="--model_name_or_path …"
	$(LAUNCH) recipes/evaluate.py --config $(RECIPE) $(ARGS)

real: $(SETUP) ## SmolLM2-135M becomes safe: make real ARGS="--xstest xstest_prompts.csv --harmbench harmbench_val.csv"
	$(PYTHON) recipes/smollm2-135m/run.py $(ARGS)

bench: $(SETUP) ## this project's trainer against stock TRL, on generated rows; make bench ARGS="--model … --dataset …"
	$(PYTHON) recipes/bench.py $(ARGS)

keys: $(SETUP) ## write recipes/KEYS.md: every key of a recipe, from the code that reads it
	PYTHONPATH=recipes $(PYTHON) -m core.config.keys > recipes/KEYS.md

test: $(SETUP) ## all tests, the slow end-to-end runs included
	$(PYTHON) -m pytest $(PYTEST_ARGS)

test-fast: $(SETUP) ## the tests without the end-to-end runs
	$(PYTHON) -m pytest -m "not slow" $(PYTEST_ARGS)

torture: $(SETUP) ## kill, damage, mislead and measure real runs, and print what is found; ARGS="-k kills" for a part
	$(PYTHON) -m pytest tests/test_torture.py tests/test_verdicts.py -m torture -s -v $(ARGS)

style: $(SETUP) ## format and mend what can be mended
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

style-check: $(SETUP) ## fail where style would change a file
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
