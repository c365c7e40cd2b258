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
DEMO_OPTIONS ?=
# Tests wait more than they compute: so many at a time on two cores, each process with servers of its own.
AT_ONCE ?= 3

.PHONY: help venvs test one coverage unit integration acceptance alone rocketmq4 on-url on-container on-mysql long whole nightly tally lint style types contracts format
.PHONY: demo bench trace servers clean

help:
	@echo 'make demo [TRANSPORT=sql|rocketmq|rocketmq4]   see it: duplicates, SIGKILLs, and the ledger is right'
	@echo '                  shorter: DEMO_OPTIONS="--orders 500 --seconds 5 --kills 1"'
	@echo 'make test         all tests this machine can carry; or one tier: unit, integration, acceptance, alone, rocketmq4'
	@echo 'make one TEST=tests/integration/guards/test_claims.py::test_name   one test, with the servers it needs'
	@echo 'make nightly      the long versions of tests, by hand, with their figures (two hours)'
	@echo 'make lint         ruff, mypy --strict, what users type, import contracts; make format mends what ruff can'
	@echo 'make bench        the figures, against dedupe written by hand'
	@echo 'make trace        the files of the package that one delivery goes through, for six trips'
	@echo 'make servers      fetch the RocketMQ server and its Java client (Maven); make clean removes all that make has made'

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
# With KEEP_GOING a tier that fails (1), or in which TEST_OPTIONS chose no test (5), does not keep the next from running.
TIER = @mkdir -p $(RESULTS); echo; echo "== $@"; rm -f $(RESULTS)/$@.xml; \
	$(1) -m pytest --junit-xml=$(RESULTS)/$@.xml -o junit_suite_name=$@ $(TEST_OPTIONS) $(2) $(3); \
	code=$$?; case $$code in 1|5) [ -n "$(KEEP_GOING)" ] || exit $$code;; *) exit $$code;; esac

# With COVERAGE=1, as CI has it, the lines and branches that unit tests take are reported; no number is demanded.
COVERED := --cov=exactly_once --cov-branch --cov-report=

unit: $(VENV)/.made
	$(call TIER,$(PY),tests/unit,-n $(AT_ONCE) $(if $(COVERAGE),$(COVERED)))
	@[ -z "$(COVERAGE)" ] || { echo; echo 'The twenty files that unit tests reach least, and the whole:'; \
	$(PY) -m coverage report --sort=cover --skip-covered | sed -n '1,22p;$$p'; }

# the same of unit and integration tests together: an hour, and a page for each file in build/coverage
coverage: $(VENV)/.made
	$(PY) -m pytest -q tests/unit tests/integration $(BY_FILE) $(COVERED) --cov-report=html:build/coverage --cov-report=term:skip-covered

# One test, with the servers it needs: make one TEST=tests/integration/guards/test_claims.py::test_name
one: $(if $(findstring rocketmq4,$(TEST)),$(VENV4)/.made,$(VENV)/.made)
	@[ -n "$(TEST)" ] || { echo 'Name it: make one TEST=tests/integration/guards/test_claims.py::test_name'; exit 2; }
	EXACTLY_ONCE_TEST_FULL=1 $(if $(findstring rocketmq4,$(TEST)),$(PY4),$(PY)) -m pytest '$(TEST)' $(TEST_OPTIONS)

# in the order of tests/integration/conftest.py
BY_FILE := -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder

integration: $(VENV)/.made
	$(call TIER,$(PY),tests/integration,$(BY_FILE))

# side by side: they wait for a condition with a deadline, and hold no time to less than seconds
acceptance: $(VENV)/.made
	$(call TIER,$(PY),tests/acceptance,--ignore-glob='*/test_rocketmq4*' -m 'not alone' -n $(AT_ONCE) --dist loadfile)

alone: $(VENV)/.made
	$(call TIER,$(PY),tests/acceptance,--ignore-glob='*/test_rocketmq4*' -m alone)

# two at a time, for each starts a broker
rocketmq4: $(VENV4)/.made
	$(call TIER,$(PY4),$(shell find tests -name 'test_rocketmq4*.py' | sort),-n 2 --dist loadfile)

TIERS := unit integration acceptance alone rocketmq4

test: venvs
	@rm -rf $(RESULTS)
	@for tier in $(TIERS); do $(MAKE) --no-print-directory KEEP_GOING=1 $$tier || exit 1; done
	@$(MAKE) --no-print-directory tally

# What is done differently where test databases come from elsewhere: the doors, and the fixtures that make them.
SOURCED := testing/test_testing_fixtures guards/test_process_door
on-url on-container: TESTS = $(SOURCED:%=tests/integration/%.py) -k 'not mariadb and not sqlite' -n 2 --dist loadfile

on-url: $(VENV)/.made
	$(call TIER,$(PY) -m tests.services.postgres_debian $(PY),$(TESTS))

# MySQL in MariaDB's place, fetched from Debian's unstable: what is worded for the server, and what ends transactions
ON_MYSQL := guards/test_claims guards/test_claim_door guards/test_claim_in_an_open_transaction watched/test_hidden_commits \
	watched/test_misuse watched/test_session_still_used executor/test_batches failures/test_failures failures/test_error_words \
	failures/test_storable connections/test_connection_settings connections/test_left_in_the_pool leases/test_leases_sql \
	leases/test_lease_guard leases/test_lease_stores leases/test_lease_traces leases/test_lease_round_trips \
	connections/test_left_before_us watched/test_commits_of_the_applications connections/test_listeners_that_ping \
	dialects/test_time_limits watched/test_used_after_the_end watched/test_given_back connections/test_hooks_that_prepare \
	connections/test_hooks_of_our_rows connections/test_hooks_of_the_users failures/test_large_bodies \
	watched/test_calls_on_the_driver watched/test_procedures_that_log failures/test_ends_badly \
	failures/test_errors_that_are_translated watched/test_refused_commits outages/test_unreached outages/test_other_databases \
	dialects/test_read_uncommitted dialects/test_clock_of_a_session watched/test_completion_type guards/test_cancelled_claims \
	guards/test_not_enforced connections/test_what_stands_before_us dialects/test_character_sets \
	watched/test_rows_before_an_error watched/test_driver_connects_anew leases/test_stopped_in_a_step \
	outages/test_wrong_while_running
on-mysql: TESTS = $(ON_MYSQL:%=tests/integration/%.py) -k "mariadb or rows_before or connects_anew or stopped_in or wrong_while" \
	-n 2 --dist loadfile
on-mysql: $(VENV)/.made
	$(call TIER,$(PY) -m tests.services.mysql_debian $(PY),$(TESTS))

on-container: $(VENV)/.made
	$(call TIER,$(PY) -m tests.services.docker_engine $(PY),$(TESTS))

# CI never runs it; it is run by hand before an issue ends. The demonstration at full size over each broker, more of the
# tests on the other sources of test databases, and what is marked `nightly`, at full length.
long: $(VENV)/.made
	$(call TIER,$(PY),tests/acceptance,--ignore-glob='*/test_rocketmq4*' -m nightly)

# what `make integration` runs a part of: all combinations of parameters, the long versions
whole: $(VENV)/.made
	$(call TIER,$(PY),tests/integration,-m nightly $(BY_FILE))

nightly: export EXACTLY_ONCE_TEST_FULL := 1
nightly: venvs
	@rm -rf build/nightly; code=0; \
	for transport in rocketmq rocketmq4; do $(NIGHTLY) demo TRANSPORT=$$transport || code=1; done; \
	for source in on-url on-container; do $(NIGHTLY) $$source SOURCED='$(SOURCED) guards/test_claims guards/test_claim_door transports/test_sql_queue' || code=1; done; \
	$(NIGHTLY) on-mysql || code=1; \
	$(NIGHTLY) whole || code=1; \
	$(NIGHTLY) long || code=1; \
	$(NIGHTLY) rocketmq4 TEST_OPTIONS='-m nightly' || code=1; \
	$(NIGHTLY) tally || code=1; exit $$code

NIGHTLY = $(MAKE) --no-print-directory KEEP_GOING=1 RESULTS=build/nightly

tally: $(VENV)/.made
	@echo; echo '== all tiers'; $(PY) -m pytest -q --no-header --tb=short -p tests.tally -p no:cacheprovider $(RESULTS)/*.xml

lint: style types contracts

style: $(VENV)/.made
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.made
	$(PY) -m mypy
	$(call TIER,$(PY),tests/types)

contracts: $(VENV)/.made
	$(VENV)/bin/lint-imports

format: $(VENV)/.made
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(if $(filter rocketmq4,$(TRANSPORT)),$(VENV4)/.made,$(VENV)/.made)
	$(if $(filter rocketmq4,$(TRANSPORT)),$(PY4),$(PY)) -m examples.demo --transport $(TRANSPORT) $(DEMO_OPTIONS)

trace: $(VENV)/.made
	@$(PY) -m benchmarks.trace $(TRIPS)

bench: venvs
	@$(PY) $(INSTALL) -e '.[bench]' || echo 'DBOS cannot be installed here: what is measured against it is skipped.'
	$(PY) -m benchmarks $(BENCH_OPTIONS)

servers: $(VENV)/.made
	$(PY) -c 'from tests.services import java_producer, rocketmq; print(rocketmq.fetch_jars(), java_producer.fetch_jars())'

clean:
	rm -rf $(VENV) $(VENV4) .servers build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
