# Two commands, each from nothing to done: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/done
	$(BIN)/semgen demo semgen-demo

test: .venv/done
	$(BIN)/python -m pytest

check: .venv/done  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# constraints.txt pins every dependency; for the CPU build of torch see README, Install
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv semgen-demo
