# Everything a newcomer types. The virtual environment is made once; stamps remember what it holds.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help install check test run faults attacks bench-peers dashboard-check docs demo cluster-demo clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.made:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	touch $@

# torch comes last: all it needs is there by then, with hashes checked. --no-deps, for the lists are complete,
# and because torch asked for by another package would come as its newest CUDA build.
.venv/.requirements: .venv/.made requirements.txt requirements-torch.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet -r requirements-torch.txt
	touch $@

.venv/.requirements-cluster: .venv/.requirements requirements-cluster.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-cluster.txt
	touch $@

.venv/.requirements-dev: .venv/.requirements-cluster requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-dev.txt
	touch $@

install: .venv/.requirements  ## make .venv with the pinned requirements, and compile our files: the units write none
	$(BIN)/python -m compileall -q *.py fleetcast

check: .venv/.requirements-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## everything CI runs: check, unit, doctest, contract, integration, coverage
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=90

docs: .venv/.requirements  ## make docs/settings.md again from the dataclasses
	$(BIN)/python -m fleetcast.settings > docs/settings.md

demo: .venv/.requirements  ## the whole loop on bundled real data, 3 CPU minutes; state stays in demo_run/
	$(BIN)/python -m fleetcast.demo

cluster-demo: .venv/.requirements-cluster  ## shards on two Ray nodes of this machine, one is killed: the account
	$(BIN)/python -m benchmarks.loop.cluster_demo

run: .venv/.requirements  ## both daemons on this machine's own metrics, live until Ctrl+C; state in run/
	@$(BIN)/python -m fleetcast.live

faults: .venv/.requirements-dev  ## every fault many times (about half an hour); the table of docs/reliability.md
	$(BIN)/python -m benchmarks.faults.faults

attacks: .venv/.requirements-dev  ## every attack of docs/security.md on a real daemon (about fifteen minutes); its table
	$(BIN)/python -m benchmarks.faults.attacks

bench-peers: .venv/.requirements  ## drift checks beside Evidently, NannyML, Alibi Detect, river (5 GB in .venv-peers/)
	$(BIN)/python -m benchmarks.drift.peer_environments
	$(BIN)/python -m benchmarks.drift.drift_speed

dashboard-check:  ## deploy/grafana/ beside Grafana's own types (needs npm, downloads 2 packages into .grafana/)
	npm install --no-audit --no-fund --no-save --ignore-scripts --prefix .grafana typescript@7.0.2 @grafana/schema@13.2.3
	cat tests/grafana_types.ts deploy/grafana/fleetcast.json > .grafana/dashboard.ts
	.grafana/node_modules/.bin/tsc --noEmit --strict --skipLibCheck --module nodenext --moduleResolution nodenext .grafana/dashboard.ts

clean:  ## remove what tests and demo leave behind (not .venv)
	rm -rf demo_run bench_run build fleetcast.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .grafana
