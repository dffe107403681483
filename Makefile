# Two commands, each from nothing to done: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin
PEERS_PYTHON ?= python3.12

.PHONY: demo test check docs settings figures bench-peers clean

demo: .venv/done
	$(BIN)/semgen demo semgen-demo

test: .venv/done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/done  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make bench-peers STORE=chest.store [OPTIONS="--rounds 3 --write"] [PEERS_PYTHON=python3.12]
bench-peers: .venv/done .venv-peers/done
	$(BIN)/python -m benchmarks.stream $(STORE) --peers $(PEERS)/python $(OPTIONS)

.venv-peers/done: benchmarks/peers-requirements.txt
	$(PEERS_PYTHON) -m venv .venv-peers
	$(PEERS)/pip install --quiet --disable-pip-version-check -c $< torch
	$(PEERS)/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# constraints.txt pins every dependency; for the CPU build of torch see README, Install
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

docs: .venv/done  ## the site of the documentation: docs/_build/index.html
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going -c docs . docs/_build

settings: .venv/done  ## the tables of settings in docs/configuration.md
	$(BIN)/python -m tests.support.settings_tables

# make figures ARCHIVES="archive sts" [OPTIONS="--label 85"]: the pictures in docs/images
figures: .venv/done
	$(BIN)/semgen prepare $(ARCHIVES) figures.store
	$(BIN)/python -m scripts.figures figures.store $(OPTIONS)

clean:
	rm -rf .venv .venv-peers semgen-demo docs/_build figures.store figures.store.catalogue
