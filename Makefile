# make demo   build nanite and run a whole system in one process, without a broker
# make test   formatting, clippy, tests, doctests, examples, and each fuzz target for 20 seconds
# make fuzz   each fuzz target for FUZZ_SECONDS seconds
# make audit  licences, bans and sources of the dependencies, changes of the public API (installs cargo-deny, cargo-semver-checks)
# make bench  the benchmarks, with ratios
# make mutants  change the code in one place at a time, and list what no test notices (installs cargo-mutants); hours to days
# make simulate  more seeds of the simulation: SEEDS=FIRST..LAST
# make evidence  run all tests, and write their results for each promise into SECURITY.md

CARGO ?= cargo
# The commit that the public API is compared with: its last reviewed state. Move it with every breaking change, and say so in CHANGELOG.md.
API_BASELINE := $(shell cat .api-baseline)
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

.PHONY: demo test fmt clippy unit doc examples fuzz audit bench mutants simulate evidence deps-build deps-test

demo: deps-build
	$(CARGO) run --release --quiet -- demo

test: deps-test fmt clippy unit doc examples fuzz

fmt:
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check

clippy:
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	$(CARGO) clippy --locked --no-default-features --lib -- -D warnings

# Tests run the examples: they are built before, so that no test waits for that.
unit: examples
ifeq ($(NEXTEST),yes)
	$(CARGO) nextest run --locked --all-features $(TESTS)
else
	@echo "cargo-nextest is not installed: only the whole run has a time limit, and not each test (cargo install --locked cargo-nextest)" >&2
	timeout --kill-after=10 1800 $(CARGO) test --locked --all-features --no-fail-fast --lib --bins --tests $(TESTS)
endif

doc:
	$(CARGO) test --locked --all-features --doc
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --all-features --no-deps --quiet

examples:
	$(CARGO) build --locked --all-features --examples

fuzz: export FUZZ_SECONDS ?= 20
fuzz: deps-test
	./scripts/fuzz.sh run

audit:
	$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check licenses bans sources
	$(CARGO) deny --manifest-path fuzz/Cargo.toml --config deny.toml check licenses bans sources
	$(CARGO) semver-checks --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-semver-checks
	$(CARGO) semver-checks --all-features --release-type minor --baseline-rev $(API_BASELINE)

bench:
	$(CARGO) bench --locked --all-features

# `make mutants FILES='-f src/policy/rules.rs'` tries only this file.
mutants: deps-test
	./scripts/mutants.sh $(FILES)

SEEDS ?= 1000..10000
simulate: deps-test
	SIMULATION_SEEDS=$(SEEDS) $(CARGO) test --locked --all-features --test suite d11_every_request_ends_truly_and_once_in_all_seeds

evidence: deps-test
	mkdir -p target
	$(MAKE) unit TESTS='-- --skip s13_the_evidence' >target/evidence.log 2>&1 || { tail -40 target/evidence.log; exit 1; }
	$(MAKE) fuzz >>target/evidence.log 2>&1 || { tail -40 target/evidence.log; exit 1; }
	./scripts/evidence.py target/evidence.log

deps-build:
	@./scripts/deps.sh build

deps-test:
	@./scripts/deps.sh test
