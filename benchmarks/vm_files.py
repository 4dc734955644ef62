"""How fast files go into a running guest and come out of it, beside a copy on the host. In one run.

    PYTHONPATH=src python3 benchmarks/vm_files.py [--runs N] [--megabytes N] [--json]

Needs root, user-mode-linux. The guest is behind `jail,vm`. Medians.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import measure
import vm_shared as guests

from stockade import machines
from stockade.vm import control, transfer

ROOM = 64 << 20
NAME = "files"


def push(source: Path, size: int) -> float:
    """MB/s into the guest."""
    began = time.perf_counter()
    transfer.push(NAME, source, "/root/copy")
    return size / (time.perf_counter() - began) / 1e6


def pull(target: Path, size: int) -> float:
    """MB/s out of the guest."""
    target.unlink(missing_ok=True)
    began = time.perf_counter()
    transfer.pull(NAME, "/root/copy", target)
    seconds = time.perf_counter() - began
    if target.stat().st_size != size:
        sys.exit(f"error: {target.stat().st_size} of {size} bytes came")
    return size / seconds / 1e6


def plain(source: Path, target: Path, size: int) -> float:
    """MB/s of a copy on the host."""
    began = time.perf_counter()
    shutil.copyfile(source, target)
    return size / (time.perf_counter() - began) / 1e6


def small(source: Path) -> float:
    """Seconds for a file of 1 KiB into the guest."""
    began = time.perf_counter()
    transfer.push(NAME, source, "/root/small")
    return time.perf_counter() - began


def line(data: bytes) -> float:
    """MB/s of standard input of a command, over the serial line."""
    began = time.perf_counter()
    control.execute(NAME, ["sh", "-c", "cat > /dev/null"], input=data)
    return len(data) / (time.perf_counter() - began) / 1e6


def main() -> int:
    parser = measure.arguments(__doc__, runs=7)
    parser.add_argument("--megabytes", type=int, default=128, help="size of the large file (default %(default)s)")
    options = parser.parse_args()
    guests.need("linux.uml")
    report = measure.Report("files in and out of a guest")
    size = options.megabytes << 20
    with guests.home() as directory:
        machines.prepare(("jail", "vm"))
        image = guests.image("roomy", guests.tree(directory / "root"), size=2 * size + ROOM)
        guests.run(NAME, image, ("jail", "vm"), memory=128 << 20).close()
        large, little = directory / "large", directory / "little"
        large.write_bytes(os.urandom(1 << 20) * options.megabytes)
        little.write_bytes(os.urandom(1024))
        push(large, size)
        ways = {
            "into the guest": partial(push, large, size),
            "out of the guest": partial(pull, directory / "back", size),
            "on the host": partial(plain, large, directory / "copy", size),
            "over the line": partial(line, os.urandom(1 << 18)),
        }
        report.add("large file", measure.in_turn(ways, options.runs), unit="MB/s", scale=1.0)
        report.add("file of 1 KiB", {"into the guest": [small(little) for _ in range(options.runs)]})
        report.compare("large file", "into the guest", "over the line", least=20)
        report.compare("large file", "out of the guest", "over the line", least=20)
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
