#!/bin/sh
# Fuzzing with libFuzzer; needs only the installed stable compiler.
#
#   fuzz.sh run [TARGET...]        each target (all of them by default) for FUZZ_SECONDS seconds, 20 by default
#   fuzz.sh repeat TARGET FILE...  runs inputs that the fuzzer found, once each
#   fuzz.sh small TARGET           copies the useful inputs of fuzz/corpus to fuzz/seeds
#   fuzz.sh list                   the targets, and the folders with the initial inputs of each
#
# New inputs stay in fuzz/corpus, where the next run continues; an input that causes a failure is in fuzz/artifacts.
set -eu
cd "$(dirname "$0")/.."
: "${CARGO:=cargo}" "${FUZZ_SECONDS:=20}"
host=$(rustc -vV | sed -n 's/^host: //p')
out=${CARGO_TARGET_DIR:-fuzz/target}/fuzz

targets() {
    for file in fuzz/fuzz_targets/*.rs; do basename "$file" .rs; done
}

# The initial inputs of a target, besides its own seeds: test vectors of the suite.
vectors() {
    case $1 in
    cms | envelope) echo tests/vectors/envelope/messages ;;
    codecs) echo tests/vectors/json-packets ;;
    esac
}

# With --target, these flags do not apply to build scripts and procedural macros.
build() {
    RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
        "$CARGO" build --quiet --locked --release --manifest-path fuzz/Cargo.toml --target "$host" --target-dir "$out" --bins
}

fuzz() { # fuzz TARGET: returns 0 if no failure was found
    mkdir -p "fuzz/corpus/$1" "fuzz/artifacts/$1" "fuzz/seeds/$1"
    log=fuzz/artifacts/$1/log
    # shellcheck disable=SC2046
    if "$out/$host/release/$1" "-max_total_time=$FUZZ_SECONDS" -timeout=30 -rss_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1 "-artifact_prefix=fuzz/artifacts/$1/" \
        "fuzz/corpus/$1" "fuzz/seeds/$1" $(vectors "$1") >"$log" 2>&1; then
        echo "fuzz $1: $(sed -n 's/^#\([0-9]*\).*DONE  *\(cov: [0-9]*\).*\(exec.s: [0-9]*\).*/\1 runs, \2, \3/p' "$log")"
        return
    fi
    tail -n 60 "$log"
    file=$(sed -n 's/.*Test unit written to //p' "$log" | tail -1)
    echo
    echo "fuzzing $1 found ${file:-an input, which the log above may name}; to repeat it:"
    echo "    scripts/fuzz.sh repeat $1 ${file:-FILE}"
    # Printed as well, in case the folder is gone, as after a run on another machine.
    if [ -n "$file" ] && [ "$(wc -c <"$file")" -le 4096 ]; then
        echo "or, if that file is gone: echo $(base64 -w0 "$file") | base64 -d > FILE"
    fi
    return 1
}

command=${1:-run}
[ $# -eq 0 ] || shift
case $command in
list)
    for target in $(targets); do
        # shellcheck disable=SC2046
        echo "$target" "fuzz/seeds/$target" $(vectors "$target")
    done
    ;;
run)
    build
    # shellcheck disable=SC2046
    [ $# -gt 0 ] || set -- $(targets)
    # One on each core, and all of them, so that every failure is shown.
    printf '%s\n' "$@" | xargs -P "$(nproc)" -n 1 "./scripts/fuzz.sh" run-built
    ;;
run-built) # for `run`
    fuzz "$1"
    ;;
repeat)
    build
    target=$1
    shift
    "$out/$host/release/$target" "$@"
    ;;
small)
    build
    # shellcheck disable=SC2046
    "$out/$host/release/$1" -merge=1 "fuzz/seeds/$1" $(vectors "$1") "fuzz/corpus/$1"
    ;;
*)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
