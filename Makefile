# Everything runs in .venv, and the tests in .venv-test; the first target that needs one makes it. PYTHON chooses the
# interpreter for both. The tests have an environment of their own because libraries that only they need are imported by
# Transformers wherever they are installed: torchao prints a dozen lines in every command beside a CPU build of torch.
PYTHON ?= python3
# Seconds that `make demo` trains; all of it takes at most 1.5 times as long.
DEMO_SECONDS ?= 240
# More arguments for pytest, such as PYTEST_ARGS="-m slow" or PYTEST_ARGS=tests/test_local_rnn.py
PYTEST_ARGS ?=
# Processes that run the tests side by side, each with one thread; one that has none left takes some of another's.
WORKERS ?= 2

VENV := .venv
TEST_VENV := .venv-test
# Versions of Transformers that `make test-versions` tries beside the pinned one: the oldest supported, and the last one
# before 5.24 renamed the cache. And what it runs with each of them: behaviours that depend on the version.
OTHER_VERSIONS := 5.17.0 5.23.0
CHOSEN_TESTS := $(addprefix tests/test_,modeling.py generation.py library_versions.py engines.py pipelines.py \
  remote_code.py loading_options.py trainer.py)
RUN := $(VENV)/bin/python
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install install-test demo reproduce-cpu reproduce-gpu test test-versions lint format clean
.PRECIOUS: $(TEST_VENV)-%/.installed

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(VENV)/.installed  ## make .venv with the pinned versions of requirements.txt and this package, editable

# The same with what the tests and the style check need.
install-test: $(TEST_VENV)/.installed

$(TEST_VENV)/.installed: requirements-test.txt
$(VENV)/.installed $(TEST_VENV)/.installed: %/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $*
	@# torch first, alone: the build that is already at hand is taken, and nothing after it fetches another
	$*/bin/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$*/bin/pip install --quiet $(patsubst %,--requirement %,$(filter requirements%,$^)) --editable '.[train]'
	@touch $@

demo: install  ## train on the standard library's source for DEMO_SECONDS, score, and write some code
	$(RUN) -m scripts.demo --seconds $(DEMO_SECONDS) --output-dir $(DEMO)

reproduce-cpu:  ## make the CPU runs of docs/RESULTS.md anew, or those of ONLY=table/row; goes on where it was stopped
reproduce-gpu:  ## the same of the runs for a GPU
reproduce-cpu reproduce-gpu: reproduce-%: install
	$(VENV)/bin/pip install --quiet --editable '.[train,baselines]'
	$(RUN) -m scripts.report --run $* --runs runs/$@ --output-dir runs/$@ \
	  $(if $(ONLY),--only $(ONLY))

test: install-test  ## run the tests; slow ones with PYTEST_ARGS="-m slow"
	OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-versions: $(OTHER_VERSIONS:%=$(TEST_VENV)-%/.installed)  ## run a chosen part of the tests with older Transformers
	for version in $(OTHER_VERSIONS); do \
	  echo "Transformers $$version"; \
	  OMP_NUM_THREADS=1 $(TEST_VENV)-$$version/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
	    $(CHOSEN_TESTS) $(PYTEST_ARGS) || exit 1; \
	done

# All packages of the tests' environment, and before them another Transformers with what it asks for.
$(TEST_VENV)-%/.installed: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/python -m venv $(@D)
	$(TEST_VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(@D)/bin/pip install --quiet "transformers==$*"
	@touch $@

lint: install-test  ## check style and formatting
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .

format: install-test  ## repair style and formatting where that can be done
	$(TEST_VENV)/bin/ruff check --fix .
	$(TEST_VENV)/bin/ruff format .

clean:  ## remove what make, the tests and training wrote here
	rm -rf $(VENV) $(TEST_VENV) $(TEST_VENV)-* runs .pytest_cache .ruff_cache
