"""The libraries of a program: found in this process, and by running `ldd`, in one run.

    PYTHONPATH=src python3 benchmarks/elf_closure.py [--runs N] [--json] [PROGRAM …]

Each measurement of ours starts from nothing: no file of the program or the host's cache is known yet. The two
take turns, ten in a row each, so that a busy moment of the machine meets both. Medians; both answers must be the
same libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from stockade.resolve import ldso

PROGRAMS = ("/usr/sbin/sshd",)
TARGET = 5.0
IN_A_ROW = 10


def ours(program: str) -> tuple[float, set[str]]:
    """Seconds, and canonical paths of the libraries."""
    began = time.perf_counter()
    found = ldso.closure(program)
    seconds = time.perf_counter() - began
    return seconds, {library.real for library in found.libraries}


def ldd(program: str) -> tuple[float, set[str]]:
    """The same by `ldd`, which runs the program's dynamic linker."""
    began = time.perf_counter()
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=30)
    seconds = time.perf_counter() - began
    words = (line.replace("=>", " ").split() for line in done.stdout.splitlines())
    paths = (next((word for word in line if word.startswith("/") and word in line[-2:]), None) for line in words)
    return seconds, {os.path.realpath(path) for path in paths if path is not None}


def measure(program: str, runs: int) -> dict[str, object]:
    """Medians in milliseconds and their ratio."""
    times: dict[str, list[float]] = {"ours": [], "ldd": []}
    (_, mine), (_, theirs) = ours(program), ldd(program)
    if mine != theirs:
        sys.exit(f"error: the answers for `{program}` differ: {sorted(mine ^ theirs)}")
    for _ in range(runs):
        times["ours"] += [ours(program)[0] for _ in range(IN_A_ROW)]
        times["ldd"] += [ldd(program)[0] for _ in range(IN_A_ROW)]
    own, other = (statistics.median(times[name]) * 1000 for name in ("ours", "ldd"))
    return {
        "program": program,
        "libraries": len(mine),
        "ours_ms": round(own, 3),
        "ldd_ms": round(other, 3),
        "ratio": round(other / own, 1),
        "target": TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", default=PROGRAMS, metavar="PROGRAM")
    parser.add_argument("--runs", type=int, default=10, help="rounds of ten each (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = [measure(program, options.runs) for program in options.programs]
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(
                "{program}: {libraries} libraries; in-process {ours_ms} ms, ldd {ldd_ms} ms: "
                "{ratio} times as fast (target {target})".format(**result)
            )
    return 0 if all(float(str(result["ratio"])) >= TARGET for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
