"""What observing costs: one file-heavy command untraced, observed, and under plain strace, in one run.

    PYTHONPATH=src python3 benchmarks/observe.py [--runs N] [--json] [-- COMMAND …]

The command (default `tar c /usr/share/doc | cat > /dev/null`: tar reads nothing when it writes to /dev/null
itself) runs in a view each time but for plain strace, which has the host. Medians of N runs; the time is
that from the command's start to its end, the view not included, the trace's reading given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from stockade import observe
from stockade.observe import tracer
from stockade.observe.exercise import CLIENT_ENVIRONMENT
from stockade.observe.parse import Recorded, parse, read
from stockade.observe.viewtree import TRACE_DIRECTORY

COMMAND = ("sh", "-c", "tar c /usr/share/doc | cat > /dev/null")
TARGET = 6.0


def in_view(command: tuple[str, ...], *, syscalls: bool = False, traced: bool = True) -> tuple[float, float, int]:
    """Seconds that the command takes in a view, seconds to read its trace, and the number of accesses."""
    with observe.View.open() as view:
        before: list[str] = []
        environment = dict(CLIENT_ENVIRONMENT)
        if traced:
            before, environment = tracer.launcher(
                f"{TRACE_DIRECTORY}/t", environment=environment, syscalls=syscalls, privileged=False
            )
        began = time.perf_counter()
        with view.spawn(command, environment=environment, before=before, processor=tracer.processor()) as process:
            status = process.wait(600)
            seconds = time.perf_counter() - began
            if status != 0:
                raise SystemExit(f"the command ended with status {status}")
            while any(found["command"] == "strace" for found in view.processes()):
                time.sleep(0.005)
        began = time.perf_counter()
        recorded = [Recorded("t", process.inner, skip=1)]
        trace = parse(read(view.scratch, recorded), recorded, names=syscalls)
        return seconds, time.perf_counter() - began, len(trace.accesses)


def plain(command: tuple[str, ...]) -> tuple[float, float, int]:
    """Seconds under `strace -f -e trace=%file`, writing to memory as the observed run does."""
    descriptor = os.memfd_create("plain")
    try:
        began = time.perf_counter()
        subprocess.run(
            ["strace", "-f", "-e", "trace=%file", "-o", f"/proc/self/fd/{descriptor}", "--", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(descriptor,),
            env=dict(CLIENT_ENVIRONMENT), check=True, timeout=600,
        )  # fmt: skip
        return time.perf_counter() - began, 0.0, 0
    finally:
        os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("command", nargs="*", default=COMMAND)
    options = parser.parse_args()
    command = tuple(options.command)
    ways: dict[str, Callable[[], tuple[float, float, int]]] = {
        "untraced": lambda: in_view(command, traced=False),
        "observed": lambda: in_view(command),
        "observed, all system calls": lambda: in_view(command, syscalls=True),
        "strace -f -e trace=%file": lambda: plain(command),
    }
    for way in ("untraced", "observed"):
        ways[way]()
    runs: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
    for _ in range(options.runs):
        for way, run in ways.items():
            runs[way].append(run())
    medians = {way: statistics.median(seconds for seconds, _, _ in results) for way, results in runs.items()}
    base = medians["untraced"]
    parsed = statistics.median(seconds for _, seconds, _ in runs["observed"])
    report = {
        "command": list(command),
        "runs": options.runs,
        "seconds": medians,
        "ratios": {way: seconds / base for way, seconds in medians.items()},
        "reading_s": parsed,
        "accesses": runs["observed"][0][2],
        "target": TARGET,
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"command: {' '.join(command)}")
        for way, seconds in medians.items():
            print(f"  {way:28} {seconds:7.3f} s  {seconds / base:6.2f} x untraced")
        print(f"  reading the trace            {parsed:7.3f} s  ({report['accesses']} accesses)")
    good = medians["observed"] <= TARGET * base and medians["observed"] < medians["strace -f -e trace=%file"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
