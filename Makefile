# Each of `make demo` and `make test` works as the first command after a clone, on a plain Debian 12 machine
# with root (or sudo) and cargo: the first step installs what is missing.
SHELL := /bin/bash
export PATH := $(HOME)/.cargo/bin:$(PATH)
CARGO ?= cargo
BIN := $(or $(CARGO_TARGET_DIR),target)/release/aquifer

.PHONY: help setup build test test-postgres test-long fuzz-long proofs bench lint deny man demo demo-dr clean

help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:           ## install the packages that building, testing and the demo need
	@scripts/setup.sh

build: setup     ## the release binary, target/release/aquifer
	$(CARGO) build --release --locked -p aquifer

test: setup      ## everything that must hold, in minutes
	$(CARGO) build --locked -p aquifer
	$(CARGO) test --workspace --locked --quiet
	$(CARGO) test -p aquifer-tests --features schedule --test schedule --locked --quiet
	$(CARGO) test -p aquifer-tests --features planted --test planted --locked --quiet
	AQUIFER_TEST_CATALOGUE=postgres $(CARGO) test --workspace --test cli --test replica --locked --quiet -- takeover oracle:: model::

# What has its catalogue in either: jobs, replicas, takeovers, plans. `make test` has the takeovers and plans of it.
ON_EITHER := replication takeover storm repo_jobs survive_kills oracle:: model::
test-postgres: setup ## the tests of jobs, replicas and takeovers with their catalogue in PostgreSQL
	$(CARGO) build --locked -p aquifer
	AQUIFER_TEST_CATALOGUE=postgres $(CARGO) test --workspace --test cli --test replica --locked --quiet -- $(ON_EITHER)

test-long: setup ## the same with many more cases, whole guests, long fuzzing and the licence gate
	$(CARGO) build --release --locked -p aquifer
	AQUIFER_TEST_SCALE=$${AQUIFER_TEST_SCALE:-20} AQUIFER_TEST_LONG=1 $(CARGO) test --workspace --locked --release --quiet
	AQUIFER_TEST_SCALE=$${AQUIFER_TEST_SCALE:-20} $(CARGO) test -p aquifer-tests --features schedule --test schedule --locked --release --quiet
	$(MAKE) fuzz-long
	$(MAKE) deny

FUZZ_SECONDS ?= 1800
fuzz-long: setup ## every fuzz target under libFuzzer for FUZZ_SECONDS, as many side by side as there are processors
	AQUIFER_LEDGER=$${AQUIFER_LEDGER:-$(CURDIR)/target/fuzz.jsonl} scripts/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_FLAGS)

KILLS := storm:: replication_killed:: takeover_killed:: survive_kills
LEDGER := $(CURDIR)/target/proofs.jsonl
proofs: setup    ## count what the tests prove, into docs/proofs.md
	rm -f $(LEDGER)
	AQUIFER_LEDGER=$(LEDGER) $(CARGO) test -p aquifer-tests --test it --locked --quiet -- \
		backups:: crash:: overlay:: stored:: filesystems:: kill:: outage::outages fuzz_smoke::
	AQUIFER_LEDGER=$(LEDGER) $(CARGO) test --workspace --test cli --locked --quiet -- $(KILLS)
	AQUIFER_LEDGER=$(LEDGER) $(CARGO) test -p aquifer-tests --features planted --test planted --locked --quiet
	scripts/proofs.py $(LEDGER) $(LONG_LEDGER) > target/proofs.md && mv target/proofs.md docs/proofs.md

bench: build     ## figures against the peers, in one run
	$(CARGO) build --release --locked -p aquifer-tests --bin foreign-bench
	scripts/bench/main.py $(GROUPS)

lint:            ## format and clippy, as the gate runs them
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked --quiet -- -D warnings

deny:            ## licences, bans and advisories
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check

man: build       ## man pages into target/man
	$(BIN) man --out target/man

demo: build      ## a real guest: backed up, deleted, recovered, pivoted live, compared file by file
	scripts/demo.py --aquifer $(BIN) $(DEMO_FLAGS)

demo-dr: build   ## a site lost and won back: scheduled backups, replica, failover to an older point, failback, commit
	scripts/demo_dr.py --aquifer $(BIN) $(DEMO_FLAGS)

clean:           ## everything this folder built
	$(CARGO) clean
	rm -rf demo-work
