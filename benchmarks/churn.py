"""Starts and stops in a row: what they leave behind, which must be nothing.

    PYTHONPATH=src python3 benchmarks/churn.py [--runs N] [--json]

The jail has limits (control groups), a volume, a tmpfs, a log, a /dev/log and a published port with its forwarder. What
there is of processes, mounts, control groups, namespaces, files and descriptors is compared before and after;
processes and namespaces only where they are Stockade's or came from this run, as others come and go meanwhile.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import measure
import msgspec

from stockade import Jail, contain, places, workflow
from stockade.records.spec import Spec

NAME = "churn"
PORT = 20999
NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup")
#: The kernel takes namespaces down in the background.
SETTLING_S = 5.0

Left = dict[str, set[str]]


def build() -> Jail:
    spec = {
        "name": NAME,
        "service": {"command": ["/bin/sleep", "infinity"], "user": "nobody"},
        "directories": {"/var/lib/churn": {"kind": "volume"}, "/var/spool": {"kind": "tmpfs"}},
        "network": {"mode": "private", "publish": [f"127.0.0.1:{PORT}:80"]},
        "limits": {"processes": 16, "memory": "64M"},
    }
    workflow.build(msgspec.convert(spec, Spec), observe=False, verify=False)
    return Jail(NAME)


def processes() -> Iterator[tuple[str, str]]:
    """Pid and command line of every process but this."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(name) != os.getpid():
            yield name, words


def namespaces(pid: str) -> set[str]:
    """Names of a process's namespaces, as `net:[4026531840]`."""
    found = set()
    for kind in NAMESPACES:
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
        except OSError:
            continue
    return found


def present(seen: set[str]) -> Left:
    """What there is now. `seen` are namespaces of jails of this run."""
    home = str(places.state().parent)
    own, alive = set(), set()
    for pid, words in processes():
        if home in words or words == "warden" or words.startswith(("sleep infinity", "/bin/sleep infinity")):
            own.add(f"{pid} {words}")
        alive |= namespaces(pid) & seen
    groups = {
        path
        for path, _, _ in os.walk("/sys/fs/cgroup")
        if os.path.basename(path).startswith(f"stockade-{NAME}")
    }
    files = {os.path.join(path, name) for path, below, names in os.walk(home) for name in (*below, *names)}
    return {
        "processes": own,
        "mounts": set(Path("/proc/self/mountinfo").read_text().splitlines()),
        "control groups": groups,
        "namespaces": alive,
        "files": files,
        "descriptors": set(os.listdir("/proc/self/fd")),
    }


def main() -> int:
    options = measure.arguments(__doc__, runs=1000).parse_args()
    report = measure.Report(f"{options.runs} starts and stops in a row")
    with measure.home():
        jail = build()
        jail.start(wait=False)
        jail.stop()
        seen: set[str] = set()
        outside = namespaces("self")
        before = present(seen)
        samples: measure.Samples = {"start": [], "stop": []}
        for _ in range(options.runs):
            began = time.perf_counter()
            running = jail.start(wait=False)
            samples["start"].append(time.perf_counter() - began)
            seen |= namespaces(str(running.init_pid)) - outside
            began = time.perf_counter()
            jail.stop()
            samples["stop"].append(time.perf_counter() - began)
        deadline = time.monotonic() + SETTLING_S
        while any((after := present(seen))[kind] - before[kind] for kind in before) and time.monotonic() < deadline:
            time.sleep(0.1)
        report.add("time", samples)
        report.figures.append(measure.Figure("jails that still run", len(contain.running()), "", most=0))
        for kind in before:
            left = after[kind] - before[kind]
            report.figures.append(measure.Figure(f"left behind: {kind}", len(left), "", most=0))
            report.notes += [f"left behind: {found}" for found in sorted(left)[:10]]
        half = len(samples["start"]) // 2
        slower = statistics.median(samples["start"][half:]) / statistics.median(samples["start"][:half])
        report.figures.append(measure.Figure("start: second half of the run / first half", slower))
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
