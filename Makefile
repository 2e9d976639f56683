# make demo   sets up what it needs and distils a data set with the embedded teacher
# make test   sets up what it needs and passes the tests
# make test-litellm   passes those of the provider litellm, which `make test` leaves out
# make test-trainers  passes those of the trainers' own loaders, which `make test` leaves out
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-litellm test-trainers check lab clean

demo: $(VENV)/.core
	$(BIN)/python -m lab.grammar --samples 200 --seed 13 --output demo/data
	$(BIN)/fastdistill pipeline run --config examples/fastdistill/demo.yaml --output-dir demo/artifacts

# Two tests at a time, for half of the time one waits. Files go out as they are sorted: by themselves, those of few tests, which
# may be the longest, would come last.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# An environment of its own: it takes over a minute to install, and needs an older python-dateutil than constraints.txt has.
test-litellm: $(VENV)-litellm/.ready
	$(VENV)-litellm/bin/python -m pytest tests/model/test_conformance.py -k litellm

# An environment of its own: it has 1.7 GB, and LLaMA-Factory asks for a TRL and a transformers from before the others'.
test-trainers: $(VENV)-trainers/.ready
	$(VENV)-trainers/bin/python -m pytest tests/trainers

# The whole loop on a small, real model: 58 CPU minutes, under 40 on two cores. What is in demo/lab already is not made again.
lab: $(VENV)/.lab
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m lab.baseline --output demo/lab

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("FastDistill needs Python 3.11 or later, this is " + sys.version.split()[0] + "; make PYTHON=python3.12 chooses another") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(INSTALL) --editable '.[dev,dedup,servers]'
	touch $@

$(VENV)/.lab: $(VENV)/.core
	$(INSTALL) --editable '.[lab]'
	touch $@

$(VENV)-litellm/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-litellm
	$(VENV)-litellm/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,litellm]'
	touch $@

# Of what LLaMA-Factory asks for, only what its loader imports: peft and omegaconf.
$(VENV)-trainers/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-trainers
	$(VENV)-trainers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,lab]' \
		trl==1.16.0 transformers==5.24.0 'mlx-lm[cpu]==0.32.2' peft==0.21.2 omegaconf==2.4.0
	$(VENV)-trainers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-litellm $(VENV)-trainers demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
