# demo, test, lint and bench set up .venv by themselves; nothing else is needed but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint format bench clean
.DEFAULT_GOAL := test

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(RUN) -m examples.demo

test: $(VENV)/installed
	$(RUN) -m pytest

lint: $(VENV)/installed
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(VENV)/installed
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(VENV)/installed
	$(RUN) -m benchmarks.train_step
	$(RUN) -m benchmarks.jax_cost
	$(RUN) -m benchmarks.mixed_batch
	$(RUN) -m benchmarks.adapters

clean:
	rm -rf $(VENV) runs
