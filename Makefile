# Everything runs in .venv, which the first target that needs it makes. PYTHON chooses the interpreter for it.
PYTHON ?= python3
# Seconds that `make demo` trains.
DEMO_SECONDS ?= 240
# More arguments for pytest, such as PYTEST_ARGS="-m slow" or PYTEST_ARGS=tests/test_local_rnn.py
PYTEST_ARGS ?=
# Processes that run the tests side by side, each with one thread and whole files.
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install install-test demo reproduce-cpu reproduce-gpu test lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(VENV)/.installed  ## make .venv with the pinned versions of requirements.txt and this package, editable

# The same with what the tests and the style check need.
install-test: $(VENV)/.installed-test

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@# torch first, alone: the build that is already at hand is taken, and nothing after it fetches another
	$(VENV)/bin/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(VENV)/bin/pip install --quiet --requirement requirements.txt --editable '.[train]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(VENV)/bin/pip install --quiet --requirement requirements-test.txt
	@touch $@

demo: install  ## train on the standard library's source for DEMO_SECONDS, score, reload, and write some code
	$(RUN) -m scripts.train stdlib-code --output-dir $(DEMO) --resume --set budget.max_seconds=$(DEMO_SECONDS)
	$(RUN) -m scripts.generate $(DEMO)/final --prompt "class Reader(" --max-new-tokens 600

reproduce-cpu:  ## make the CPU runs of docs/RESULTS.md anew, or those of ONLY=table/row; goes on where it was stopped
reproduce-gpu:  ## the same of the runs for a GPU
reproduce-cpu reproduce-gpu: reproduce-%: install
	$(VENV)/bin/pip install --quiet --editable '.[train,baselines]'
	$(RUN) -m scripts.report --run $* --runs runs/$@ --results runs/$@/results --output runs/$@/RESULTS.md \
	  $(if $(ONLY),--only $(ONLY))

test: install-test  ## run the tests; slow ones with PYTEST_ARGS="-m slow"
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: install-test  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install-test  ## repair style and formatting where that can be done
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove what make, the tests and training wrote here
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
