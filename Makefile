# make demo: install into .venv and train the default model to the end; make test: install and run the tests.
# The first of these that runs and is Python 3.11 to 3.13; another one: make demo PYTHON=/path/to/python.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check mutants bench methods studies docs clean

demo: $(VENV)/.installed
	$(BIN)/moe-lab train router=gumbel_ste

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "moe-lab needs Python 3.11, 3.12 or 3.13; say make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# Plant one error per method, each in a copy of the tree, and demand that a test turns red (long: each runs tests of its own).
mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants/run.py

# Measure speed and memory against the targets (a few minutes on an idle machine).
bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

# Train every method for 100 steps on two data sets, in fp32 and bf16, and at its edges (some 15 minutes on 2 cores).
methods: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.matrix

# The runs of docs/dashboards.md, by the commands that stand there.
DASHBOARDS := healthy collapsed undecided unspecialised oscillating
SMALL := $(shell sed -n 's/^SMALL="\(.*\)"$$/\1/p' docs/dashboards.md)

# Run the studies, or those named (make studies STUDIES="collapse leak"), and write docs/results (7 to 10 minutes each).
STUDIES := $(basename $(notdir $(wildcard sweeps/*.yaml)))
studies: $(VENV)/.installed-test
	for study in $(STUDIES); do $(BIN)/moe-lab sweep $$study scale=cpu || exit 1; done
	$(BIN)/python -m benchmarks.studies $(addprefix outputs/sweeps/,$(STUDIES))

# Draw the README's pictures from real runs, and the metric and verdict pages from their declarations.
docs: $(VENV)/.installed-test
	$(BIN)/moe-lab train router=gumbel_ste logger=[] hydra.run.dir=outputs/pictures/demo
	$(BIN)/moe-lab train router=switch balance=[] logger=[] hydra.run.dir=outputs/pictures/collapsed
	$(BIN)/moe-lab train router=switch balance=[switch] logger=[] hydra.run.dir=outputs/pictures/balanced
	$(BIN)/python docs/pictures.py outputs/pictures/demo outputs/pictures/collapsed outputs/pictures/balanced
	for run in $(DASHBOARDS); do $(BIN)/moe-lab train $(SMALL) $$(sed -n "s|^moe-lab train .SMALL \\(.*/$$run\\)$$|\\1|p" docs/dashboards.md) || exit; done
	$(BIN)/python docs/dashboards.py $(DASHBOARDS:%=outputs/dashboards/%)
	$(BIN)/python -m moe_lab.observe.document docs
	$(BIN)/python -m moe_lab.methods

clean:
	rm -rf $(VENV) build dist
