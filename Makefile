# make results   install into .venv and run the main job on the embedded default model
# make test      install into .venv with the development tools and pass the tests
# make soak      break things for two hours and count what came of it
# make campaign  an hour of workers under pressure: low limits, up to 64 clients, kills, faults, silent and greedy streams
# make lint      style, types, layers, workflow lint, generated files, documentation
# make settings  what is made from the settings: schema, config/config.yaml, the table of its keys
# make docs      the documentation as a site, build/docs
# make rulegraph draw docs/rulegraph.svg again
PYTHON ?= python3.11
CORES ?= 2
# Where to look for PyTorch as well, as for its CPU build: make results TORCH_INDEX=URL
TORCH_INDEX ?=

BIN := .venv/bin
# Python compiles what it imports and keeps that; all of PyTorch at once takes a minute.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --constraint envs/constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Rules call `specsplit`: the environment must be on the path.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: results test test-all test-slurm soak campaign lint docs proto rulegraph clean

results: .venv/installed
	$(RUN) snakemake --cores $(CORES) results/summary.csv results/report.html
	@cat results/logs/summary.log

# One process a core. Tests of a file share workers and workflows, so they stay together; the long files come first.
test: .venv/installed-dev
	$(RUN) pytest -n $(CORES) --dist loadfile --no-loadscope-reorder -m "not slow" tests/workflow tests/integration tests/property tests/unit

test-all: .venv/installed-dev
	$(RUN) pytest

# About an hour: workers, benchmarks, workflows and networks broken on purpose; docs/reliability.md has its figures.
soak: .venv/installed-dev
	for seed in 1 2 3 4; do $(RUN) python tests/soak.py workers --kills 40 --seed $$seed || exit 1; done
	$(RUN) python tests/soak.py bench --kills 30 --seed 5
	$(RUN) python tests/soak.py own --kills 10 --seed 6
	$(RUN) python tests/soak.py workflow --kills 10 --seed 7
	$(RUN) python tests/soak.py load --minutes 30 --clients 8 --curve soak-memory.csv
	$(RUN) python tests/soak.py serve --minutes 30 --kills 0
	$(RUN) python tests/soak.py serve --minutes 6 --kills 8

campaign: .venv/installed-dev
	for seed in 1 2 3 4; do $(RUN) python tests/soak.py pressure --minutes 15 --seed $$seed || exit 1; done

# A sweep on a SLURM cluster of one node: needs root and Debian, and is skipped elsewhere.
test-slurm: .venv/installed-dev
	$(RUN) pytest -m slow tests/workflow/test_slurm.py -k sweep

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(RUN) lint-imports
	$(RUN) snakemake --lint
	$(RUN) scripts/proto.sh --check
	$(RUN) python scripts/settings.py --check
	$(RUN) python scripts/rulegraph.py --check

# Warnings, as of a link that leads nowhere, are errors.
docs: .venv/installed-dev
	$(BIN)/mkdocs build --quiet

# What is made from the settings: the schema, the table of config/README.md, config/config.yaml.
settings: .venv/installed-dev
	$(RUN) python scripts/settings.py

# Generate the gRPC stubs from the .proto file.
proto: .venv/installed-dev
	$(RUN) scripts/proto.sh

# What depends on what, by rule. The dates of files and the names of runs are not in it.
rulegraph: .venv/installed
	$(RUN) python scripts/rulegraph.py

clean:
	rm -rf results .snakemake

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml envs/constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) --editable .
	touch $@

.venv/installed-dev: pyproject.toml envs/constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@ .venv/installed
