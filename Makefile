# demo, test, lint and bench set up .venv by themselves; nothing else is needed but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
FUZZED := .venv-fuzz
FUZZ ?= 3600

.PHONY: demo test test-leaks test-published test-quantizers fuzz lint format bench clean
.DEFAULT_GOAL := test

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(RUN) -m examples.demo

# Two processes at once, each file's tests in one of them.
test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile

# JAX's side under JAX's check for tracers that outlive their trace, which traces anew at every call: half an hour.
test-leaks: $(VENV)/installed
	JAX_CHECK_TRACER_LEAKS=1 $(RUN) -m pytest -n 2 --dist loadfile -o timeout=1800 tests/road_jax

# Each in an environment of its own: Flax models of other packages; layers of GPTQ, AWQ, HQQ, quanto and
# compressed-tensors.
.venv-published/installed .venv-quantizers/installed: .venv-%/installed: tests_%/requirements.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

test-published test-quantizers: test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest tests_$*

# Every reader on spoilt files, for so many seconds: make fuzz FUZZ=60. What it has learnt is kept in runs/fuzz.
$(FUZZED)/installed: constraints.txt
	test -x $(FUZZED)/bin/python || $(PYTHON) -m venv $(FUZZED)
	$(FUZZED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		atheris==3.0.0 numpy regex rich safetensors
	touch $@

fuzz: $(FUZZED)/installed
	mkdir -p runs/fuzz/corpus
	PYTHONPATH=. $(FUZZED)/bin/python tests/fuzz/readers.py runs/fuzz/corpus \
		-max_total_time=$(FUZZ) -artifact_prefix=runs/fuzz/

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
	$(RUN) -m benchmarks.kernel
	$(RUN) -m benchmarks.conversion

clean:
	rm -rf $(VENV) .venv-published .venv-quantizers $(FUZZED) runs
