# `make demo` and `make test` do all the set-up: they need Python 3.11+, git and make. Everything they make stays in here.
SHELL := /bin/bash
PYTHON ?= python3
TRANSPORT ?= sql
# The two RocketMQ clients install a package of the same name, so there are two environments.
VENV := .venv
VENV4 := .venv-rocketmq4
PY := $(VENV)/bin/python
PY4 := $(VENV4)/bin/python
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
RESULTS := build/junit
TEST_OPTIONS ?=
BENCH_OPTIONS ?=

.PHONY: help venvs test unit integration acceptance rocketmq4 tally lint style types contracts format demo bench servers clean

help:
	@echo 'make demo [TRANSPORT=sql|memory|rocketmq|rocketmq4]   see it: duplicates, SIGKILLs, and the ledger is right'
	@echo 'make test         all tests this machine can carry; or one tier: unit, integration, acceptance, rocketmq4'
	@echo 'make lint         ruff, mypy --strict, import contracts; make format mends what ruff can'
	@echo 'make bench        the figures, against dedupe written by hand'
	@echo 'make servers      fetch the RocketMQ server (Maven); make clean removes all that make has made'

$(VENV)/.made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed; name it: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'Making $(VENV) (20 to 60 s, once) ...'
	@$(PYTHON) -m venv --clear $(VENV) || { echo 'If ensurepip is missing: apt-get install python3-venv'; exit 1; }
	@$(PY) $(INSTALL) -e '.[rocketmq,test,lint]'
	@touch $@

# librocketmq, the C++ library under rocketmq-client-python, comes from the wheel `rocketmq`, x86-64 Linux only. Both
# wheels hold a package `rocketmq`; the one to keep goes in last.
$(VENV4)/.made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed; name it: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'Making $(VENV4) (20 to 60 s, once) ...'
	@$(PYTHON) -m venv --clear $(VENV4) || { echo 'If ensurepip is missing: apt-get install python3-venv'; exit 1; }
	@$(PY4) $(INSTALL) -e '.[rocketmq4,test]'
	@$(PY4) $(INSTALL) --no-deps rocketmq || echo 'No wheel brings librocketmq to this machine: what needs it is skipped.'
	@$(PY4) $(INSTALL) --no-deps --force-reinstall rocketmq-client-python
	@touch $@

venvs: $(VENV)/.made $(VENV4)/.made

# Each tier is one run of pytest that leaves its results; `tally` says them all once more, and fails if any of them did.
# A tier that fails does not keep the next from running.
TIER = @mkdir -p $(RESULTS); echo; echo "== $@"; rm -f $(RESULTS)/$@.xml; \
	$(1) -m pytest --junit-xml=$(RESULTS)/$@.xml -o junit_suite_name=$@ $(TEST_OPTIONS) $(2) $(3); \
	code=$$?; [ $$code -le 1 ] || exit $$code; [ $$code = 0 ] || [ -n "$(KEEP_GOING)" ]

unit: $(VENV)/.made
	$(call TIER,$(PY),tests/unit)

# several at a time, each with servers of its own; the tiers that kill processes and watch the clock run alone
integration: $(VENV)/.made
	$(call TIER,$(PY),tests/integration,-n auto --maxprocesses 4 --dist loadfile)

acceptance: $(VENV)/.made
	$(call TIER,$(PY),tests/acceptance,--ignore-glob='*/test_rocketmq4*')

rocketmq4: $(VENV4)/.made
	$(call TIER,$(PY4),$(shell find tests -name 'test_rocketmq4*.py' | sort))

test: venvs
	@rm -rf $(RESULTS)
	@for tier in unit integration acceptance rocketmq4; do $(MAKE) --no-print-directory KEEP_GOING=1 $$tier || exit 1; done
	@$(MAKE) --no-print-directory tally

tally: $(VENV)/.made
	@echo; echo '== all tiers'; $(PY) -m pytest -q --no-header --tb=short -p tests.tally -p no:cacheprovider $(RESULTS)/*.xml

lint: style types contracts

style: $(VENV)/.made
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.made
	$(PY) -m mypy

contracts: $(VENV)/.made
	$(VENV)/bin/lint-imports

format: $(VENV)/.made
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(if $(filter rocketmq4,$(TRANSPORT)),$(VENV4)/.made,$(VENV)/.made)
	$(if $(filter rocketmq4,$(TRANSPORT)),$(PY4),$(PY)) -m examples.demo --transport $(TRANSPORT)

bench: venvs
	@$(PY) $(INSTALL) -e '.[bench]' || echo 'DBOS cannot be installed here: what is measured against it is skipped.'
	$(PY) -m benchmarks $(BENCH_OPTIONS)

servers: $(VENV)/.made
	$(PY) -c 'from tests.services.rocketmq import fetch_jars; print(fetch_jars())'

clean:
	rm -rf $(VENV) $(VENV4) .servers build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
