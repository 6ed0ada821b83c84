# Every target works from a bare clone: it makes .venv and installs what it needs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test lint format bench help clean

demo: .venv/.installed  ## draw a small video set, extract it, train heads, evaluate, print the table
	$(BIN)/coldframe demo

test: .venv/.installed  ## run the tests (two processes)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.installed  ## format check, lint, type check, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/coldframe
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: .venv/.installed  ## let ruff rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed  ## run every benchmark, one JSON line each, appended to tests/benchmarks/results.jsonl
	$(BIN)/python tests/benchmarks/run.py

clean:  ## remove the environment and everything that was built
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .import_linter_cache

help:  ## print this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 14

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
