#!/bin/sh
# Mutation testing: changes the code in one place, runs the tests, and lists the changes that no test notices. See docs/testing.md.
#
#   mutants.sh                    everything in .cargo/mutants.toml: hours to days, but it can be ended and started again
#   mutants.sh -f FILE...         only these source files
#
# The first pass runs the unit tests, in seconds for each change; the second all tests, for what the first has not noticed. What is
# noticed once is not tried again (`--iterate`), also in later runs: remove target/mutants.out to start from the beginning.
set -eu
cd "$(dirname "$0")/.."
: "${CARGO:=cargo}"
"$CARGO" mutants --version >/dev/null 2>&1 || "$CARGO" install --locked cargo-mutants
"$CARGO" nextest --version >/dev/null 2>&1 || "$CARGO" install --locked cargo-nextest

pass() { # pass OPTIONS... -- OPTIONS OF THE TESTS...: what remains is no failure
    code=0
    "$CARGO" mutants --iterate "$@" || code=$?
    # 2: some changes were not noticed. 3: some tests did not end in time.
    case $code in
    0 | 2 | 3) ;;
    *) exit "$code" ;;
    esac
}

pass "$@" -- --lib
pass "$@" -- --lib --bins --tests
echo "not noticed by any test (the reasons are in docs/testing.md):"
cat target/mutants.out/missed.txt target/mutants.out/timeout.txt
