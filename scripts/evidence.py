#!/usr/bin/env python3
"""Writes the evidence table of SECURITY.md from the output of a run of the tests.

    evidence.py LOG    LOG: the output of `cargo nextest run` or `cargo test`; '-' is standard input

Every test that a promise names must be in the log and have passed. Otherwise the script lists the missing ones, writes nothing, and
exits with code 1.
"""

import datetime
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- evidence: written by `make evidence` -->", "<!-- end of the evidence -->"


def results(log):
    """Whether each test passed, by its full path, from the output of either runner."""
    nextest = r"^\s*(PASS|FAIL|SIGABRT|SIGSEGV|TIMEOUT|LEAK)\S* \[[^]]*\](?: \([^)]*\))? \S+ (\S+)$"
    cargo = r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED)$"
    found = [(name, verdict in ("PASS", "LEAK")) for verdict, name in re.findall(nextest, log, re.M)]
    found += [(name, verdict == "ok") for name, verdict in re.findall(cargo, log, re.M)]
    passed = {}
    for name, good in found:
        passed[name] = passed.get(name, True) and good
    return passed


def by_name(passed):
    """Whether all tests of each name passed: some tests run with each transport."""
    found = {}
    for path, good in passed.items():
        name = path.split("::")[-1]
        found[name] = found.get(name, True) and good
    return found


def fuzzed(log):
    """How many inputs each fuzz target ran, from the log."""
    return sorted(re.findall(r"^fuzz (\w+): (\d+) runs", log, re.M))


def promises(text):
    """Number, bold title and named tests of every promise."""
    section = text.split("## Promises")[1].split("\n## ")[0]
    for part in re.split(r"\n(?=\d+\. )", section)[1:]:
        number, rest = re.match(r"(\d+)\. (.*)", part, re.S).groups()
        title = re.match(r"\*\*(.*?)\*\*", rest, re.S).group(1).replace("\n", " ")
        title = re.sub(r"\s+", " ", title).rstrip(".,:;")
        yield int(number), title, re.findall(r"`([nsdpu]\d\d_\w+)`", rest)


def version(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main():
    log = sys.stdin.read() if sys.argv[1] == "-" else pathlib.Path(sys.argv[1]).read_text()
    path = ROOT / "SECURITY.md"
    text = path.read_text()
    ran = results(re.sub(r"\x1b\[[0-9;]*m", "", log))
    passed, rows, missing = by_name(ran), [], []
    for number, title, tests in promises(text):
        missing += [f"promise {number}: {test}" for test in tests if not passed.get(test)]
        rows.append(f"| {number} | {title} | {len(tests)} | {sum(bool(passed.get(test)) for test in tests)} |")
    if missing:
        sys.exit("not in the log, or not passed:\n  " + "\n  ".join(missing))
    security = [name for name in (path.split("::")[-1] for path in ran) if re.match(r"s\d\d_", name)]
    count = lambda row: sum(name.startswith(row) for name in security)
    by_row = ", ".join(f"{row} {count(row)}" for row in sorted({name[:3] for name in security}))
    package = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M).group(1)
    lines = [
        BEGIN,
        f"Version {package}, {datetime.date.today()}, {version('rustc', '--version').split(' (')[0]}, "
        f"{' '.join(version('openssl', 'version').split()[:2])}: {sum(ran.values())} of {len(ran)} tests passed, "
        f"{len(security)} of them about security ({by_row}).",
        "",
        "| promise | | tests | passed |",
        "|---|---|---|---|",
        *rows,
    ]
    if runs := fuzzed(log):
        lines += ["", "Fuzzed in the same run: " + ", ".join(f"`{name}` {int(n):,} times" for name, n in runs) + ", nothing found."]
    before, rest = text.split(BEGIN)
    path.write_text(before + "\n".join(lines) + "\n" + END + rest.split(END)[1])
    print(f"SECURITY.md: {len(rows)} promises, {len(ran)} tests")


main()
