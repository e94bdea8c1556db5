# The list of everything that there is to run. `make chat` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .bench-venv
AUDIT_VENV := .audit-venv
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help chat test faults-small faults faults-kill faults-others faults-simulated faults-load soak bench bench-quick bench-gate audit check lint types proto proto-check fmt lock clean
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# Everything a set-up prints goes to stderr: `make chat` keeps stdout for replies.
$(VENV)/run.stamp: requirements.lock pyproject.toml
	@echo "setting up (once) …" >&2
	@$(PYTHON) -m venv --without-pip --clear $(VENV) >&2
	@$(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check --require-hashes -r requirements.lock >&2
	@$(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check --no-deps --no-build-isolation -e . >&2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.lock
	@echo "setting up the tests (once) …" >&2
	@$(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock >&2
	@touch $@

chat: $(VENV)/run.stamp ## talk to a coach; with piped lines, answer each
	@$(BIN)/vida-coach chat

test: $(VENV)/dev.stamp ## run the tests, two at a time
	@$(BIN)/python -m pytest -n 2 --dist worksteal

# Suites elsewhere that have sizes as well.
SIZED_SUITES := tests/e2e/test_malformed_input.py tests/integration/test_openai_streams.py
faults-small: $(VENV)/dev.stamp ## kill, freeze and cut everything, for about a quarter of an hour
	@VIDA_TEST_SIZE=small $(BIN)/python -m pytest -q -s tests/faults tests/simulation $(SIZED_SUITES)

faults: faults-kill faults-others faults-simulated ## the same at the large size, for hours; -j3 keeps two cores busy
	@$(MAKE) faults-load

# What is killed and cut in real time comes first; what is simulated takes what they leave of the processors.
faults-kill: $(VENV)/dev.stamp
	@VIDA_TEST_SIZE=large $(BIN)/python -m pytest -q -s tests/faults/test_kill.py

faults-others: $(VENV)/dev.stamp
	@VIDA_TEST_SIZE=large $(BIN)/python -m pytest -q -s \
		$(filter-out tests/faults/test_kill.py $(LOAD_SUITES),$(wildcard tests/faults/test_*.py))

faults-simulated: $(VENV)/dev.stamp
	@VIDA_TEST_SIZE=large nice $(BIN)/python -m pytest -q -s tests/simulation $(SIZED_SUITES)

# These measure what others get while one takes all that there is: they need the machine to themselves.
LOAD_SUITES := $(addprefix tests/faults/test_,backup.py hostile_clients.py load.py proxy.py soak.py)
faults-load: $(VENV)/dev.stamp
	@VIDA_TEST_SIZE=large $(BIN)/python -m pytest -q -s $(LOAD_SUITES)

soak: $(VENV)/dev.stamp ## 100,000 turns, and what is left of them
	@VIDA_TEST_SIZE=large $(BIN)/python -m pytest -q -s tests/faults/test_soak.py

# What the service is compared with and does not need itself. Where it can't be installed the bench says why.
$(BENCH_VENV)/bench.stamp: bench/requirements.lock
	@echo "setting up what the bench compares with (once) …" >&2
	@$(PYTHON) -m venv --without-pip --clear $(BENCH_VENV) >&2
	@if $(PYTHON) -m pip --python $(BENCH_VENV)/bin/python install -q --disable-pip-version-check --require-hashes \
		-r bench/requirements.lock 2>$(BENCH_VENV)/why-not; then touch $@; else cat $(BENCH_VENV)/why-not >&2; fi

bench: $(VENV)/dev.stamp $(BENCH_VENV)/bench.stamp ## measure the speed beside references, for hours
	@PYTHONPATH=bench:tests $(BIN)/python -m speed $(BENCH_ARGS)

bench-quick: $(VENV)/dev.stamp $(BENCH_VENV)/bench.stamp ## see that the bench runs, for some minutes
	@PYTHONPATH=bench:tests $(BIN)/python -m speed --quick $(BENCH_ARGS)

bench-gate: $(VENV)/dev.stamp ## fail where something has become much slower
	@$(BIN)/python bench/gate.py

$(AUDIT_VENV)/audit.stamp: audit/requirements.lock
	@echo "setting up the audit (once) …" >&2
	@$(PYTHON) -m venv --without-pip --clear $(AUDIT_VENV) >&2
	@$(PYTHON) -m pip --python $(AUDIT_VENV)/bin/python install -q --disable-pip-version-check --require-hashes \
		-r audit/requirements.lock >&2
	@touch $@

audit: $(VENV)/dev.stamp $(AUDIT_VENV)/audit.stamp ## weaknesses, licences, secrets; writes dist/sbom.cdx.json
	@$(AUDIT_VENV)/bin/python audit/check.py

check: lint types proto-check audit bench-gate test ## everything that must pass before a change lands

lint: $(VENV)/dev.stamp ## ruff, buf and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/buf lint
	@$(BIN)/buf format -d --exit-code
	@if git rev-parse -q --verify refs/remotes/origin/main >/dev/null; then \
		$(BIN)/buf breaking --against '.git#ref=refs/remotes/origin/main'; fi

types: $(VENV)/dev.stamp ## mypy, strict
	@$(BIN)/mypy

proto: $(VENV)/dev.stamp ## generate the API's code
	@$(BIN)/buf format -w
	@$(BIN)/python scripts/generate_protos.py

proto-check: $(VENV)/dev.stamp ## fail where the generated code is stale
	@$(BIN)/python scripts/generate_protos.py --check

fmt: $(VENV)/dev.stamp ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: $(VENV)/dev.stamp ## pin the dependencies anew, with hashes and without index addresses
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install -q uv
	@for set in "requirements.lock --extra build --extra otel" \
		"requirements-dev.lock --extra build --extra otel --extra dev"; do \
		$(BIN)/python -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
			--no-annotate --no-emit-index-url pyproject.toml -o $$set; done
	@$(BIN)/python -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --no-emit-index-url bench/requirements.in -o bench/requirements.lock
	@$(BIN)/python -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --no-emit-index-url audit/requirements.in -o audit/requirements.lock

clean: ## remove everything that can be made again
	rm -rf $(VENV) $(BENCH_VENV) $(AUDIT_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
