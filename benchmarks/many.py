"""Many jails at once: the time to start them, and the memory that Stockade's own processes add for each.

    PYTHONPATH=src python3 benchmarks/many.py [--jails N] [--json]

Needs root, for the memory of other users' processes is read. Memory is PSS (proc(5), smaps_rollup): a page that several
processes share is divided among them. A jail has a supervisor outside and a PID 1 inside; the helper that serves its
published port is counted apart, and its service is not Stockade's.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import measure
import msgspec

from stockade import Jail, contain, workflow
from stockade.records.spec import Spec

FIRST_PORT = 20000
TARGET_MB = 0.5


def build(number: int) -> Jail:
    """A small service with a published port, a volume and its own limits."""
    spec = {
        "name": f"many{number}",
        "service": {"command": ["/bin/sleep", "infinity"], "user": "nobody"},
        "network": {"mode": "private", "publish": [f"127.0.0.1:{FIRST_PORT + number}:80"]},
        "limits": {"processes": 16},
    }
    workflow.build(msgspec.convert(spec, Spec), observe=False, verify=False)
    return Jail(f"many{number}")


def pss_kb(pid: int) -> int:
    """Proportional set size of a process in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def helpers(inits: Iterable[int]) -> list[int]:
    """Forwarders of the jails whose PID 1 these are."""
    wanted = {str(pid) for pid in inits}
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[1:2] == ["forward"] and words[2] in wanted:
            found.append(int(name))
    return found


def main() -> int:
    parser = measure.arguments(__doc__, runs=1)
    parser.add_argument("--jails", type=int, default=100)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: only root may read the memory of the jails' processes")
    report = measure.Report(f"{options.jails} jails at once")
    with measure.home():
        jails = [build(number) for number in range(options.jails)]
        samples: measure.Samples = {"start of one": []}
        for jail in jails:
            began = time.perf_counter()
            jail.start(wait=False)
            samples["start of one"].append(time.perf_counter() - began)
        report.add("time", samples)
        report.figures.append(measure.Figure("time: start of all", sum(samples["start of one"]), "s"))
        running = contain.running()
        report.figures.append(measure.Figure("jails that run", len(running), "", least=options.jails))
        own = [(pss_kb(jail.supervisor_pid), pss_kb(jail.init_pid)) for jail in running]
        served = [pss_kb(pid) for pid in helpers(jail.init_pid for jail in running)]
        for name, values in (
            ("supervisor", [outside for outside, _ in own]),
            ("PID 1", [inside for _, inside in own]),
            ("network helper", served),
        ):
            report.figures.append(measure.Figure(f"PSS per jail: {name}", statistics.mean(values) / 1024, "MB"))
        total = statistics.mean(map(sum, own)) / 1024
        report.figures.append(measure.Figure("PSS per jail: supervisor + PID 1", total, "MB", most=TARGET_MB))
        began = time.perf_counter()
        for jail in jails:
            jail.stop()
        report.figures.append(measure.Figure("time: stop of all", time.perf_counter() - began, "s"))
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
