"""What an audit costs: a jail of some 500 files, and a Debian minbase tree, each against hashing the same files.

    PYTHONPATH=src python3 benchmarks/audit.py [--runs N] [--json] [--tree DIR]

The jail is built, unobserved, from programs of this host with their libraries. Without --tree the Debian tree is
made with mmdebstrap, where that is installed; `mmdebstrap --variant=minbase bookworm DIR` keeps one for other runs.
Medians of N runs; the ratio is to `find -type f -exec sha256sum {} +` on the same tree in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stockade import elf, workflow
from stockade.assure import audit
from stockade.build.generations import Store
from stockade.records.spec import Files, Limits, Service, Spec

PROGRAMS = 290  # with their libraries some 500 files
TARGETS = {"jail": 1.0, "minbase": 10.0}


def programs() -> Iterator[str]:
    """ELF programs of the host, by name."""
    for name in sorted(os.listdir("/usr/bin")):
        path = os.path.realpath(f"/usr/bin/{name}")
        if path.startswith("/usr/bin/") and os.path.isfile(path) and elf.read(path) is not None:
            yield path


def built() -> audit.Subject:
    """A jail of PROGRAMS programs with all that they are linked with."""
    names = list(dict.fromkeys(programs()))[:PROGRAMS]
    spec = Spec(
        name="audited", service=Service(command=("/usr/bin/sleep", "1"), user="nobody"),
        files=Files(programs=tuple(names)), limits=Limits(memory="64M", processes=10),
    )  # fmt: skip
    workflow.build(spec, observe=False, verify=False)
    generation = Store(spec.name).current()
    assert generation is not None
    return audit.of_generation(spec.name, generation)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def hashed(root: Path) -> None:
    subprocess.run(
        ["find", str(root), "-xdev", "-type", "f", "-exec", "sha256sum", "{}", "+"],
        stdout=subprocess.DEVNULL, check=True, timeout=600,
    )  # fmt: skip


def measured(subject: audit.Subject, runs: int) -> dict[str, float]:
    report = audit.audit(subject)
    hashed(subject.root)
    audited = statistics.median(seconds(lambda: audit.audit(subject)) for _ in range(runs))
    base = statistics.median(seconds(lambda: hashed(subject.root)) for _ in range(runs))
    files = sum(1 for path in subject.root.rglob("*") if path.is_file() and not path.is_symlink())
    return {"entries": report.examined, "files": files, "seconds": audited, "hashing_s": base, "ratio": audited / base}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tree", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["STOCKADE_HOME"] = f"{scratch}/home"
        subjects = {"jail": built()}
        tree = options.tree
        if tree is None and shutil.which("mmdebstrap"):
            tree = Path(scratch, "minbase")
            subprocess.run(["mmdebstrap", "-q", "--variant=minbase", "bookworm", str(tree)], check=True, timeout=900)
        if tree is not None:
            subjects["minbase"] = audit.of_directory(tree)
        results = {name: measured(subject, options.runs) for name, subject in subjects.items()}
    if options.json:
        print(json.dumps({"runs": options.runs, "targets": TARGETS, "results": results}, indent=2))
    else:
        for name, result in results.items():
            print(f"{name:8} {result['files']:6.0f} files  {result['seconds']:6.3f} s (at most {TARGETS[name]:g})  "
                  f"{result['ratio']:5.2f} x hashing")  # fmt: skip
    return 0 if all(result["seconds"] <= TARGETS[name] for name, result in results.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
