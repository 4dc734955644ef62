"""What the benchmarks share: ways that take turns, medians, figures beside their targets. Measures nothing itself."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"
NOBODY = 65534
MEMORY = "/dev/shm"
SYSTEM_PYTHON = "/usr/bin/python3"

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """One result. `most` or `least` is its target, where it has one."""

    name: str
    value: float
    unit: str = "x"
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    def __str__(self) -> str:
        target = "".join(
            f"target {sign} {limit:g}: {'met' if self.met else 'MISSED'}"
            for sign, limit in (("<=", self.most), (">=", self.least))
            if limit is not None
        )
        return f"  {self.name:58} {self.value:10.3f} {self.unit:6} {target}".rstrip()


@dataclass
class Report:
    """What one run of a benchmark found: the figures, and the samples behind them."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    samples: dict[str, Samples] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, group: str, samples: Samples, *, unit: str = "ms", scale: float = 1000.0) -> None:
        """Keep samples, and give each way's median as a figure without a target."""
        self.samples[group] = samples
        for way, values in samples.items():
            self.figures.append(Figure(f"{group}: {way}", statistics.median(values) * scale, unit))

    def compare(
        self, group: str, ours: str, theirs: str, *, most: float | None = None, least: float | None = None
    ) -> None:
        """The median of the ratios that the rounds of `group` have: a slow hour of the machine is on both sides."""
        samples = self.samples[group]
        value = statistics.median(mine / other for mine, other in zip(samples[ours], samples[theirs], strict=True))
        self.figures.append(Figure(f"{group}: {ours} / {theirs}", value, most=most, least=least))

    def limit(self, name: str, *, most: float) -> None:
        """Give the figure `name` a target."""
        self.figures = [replace(figure, most=most) if figure.name == name else figure for figure in self.figures]

    def finish(self, *, as_json: bool) -> int:
        """Print everything; 0 when every target was met, else 1."""
        met = all(figure.met for figure in self.figures)
        if as_json:
            figures = [vars(figure) | {"met": figure.met} for figure in self.figures]
            print(json.dumps({"title": self.title, "figures": figures, "notes": self.notes, "met": met}, indent=2))
        else:
            print(self.title)
            for line in (*self.figures, *(f"  {note}" for note in self.notes)):
                print(line)
            print(f"again: {' '.join(('python3', *sys.argv))}")
        return 0 if met else 1


def in_turn(ways: Mapping[str, Callable[[], float | None]], runs: int, *, warm: int = 2) -> Samples:
    """Run every way `runs` times, one after the other in each round, so that a busy moment of the machine meets all.

    The order is another in each round, as what one way leaves to the kernel to clean up delays the next. A way gives
    its result, or None: then the seconds that it took are it.
    """
    names = list(ways)
    order = random.Random(0)
    samples: Samples = {name: [] for name in names}
    for number in range(-warm, runs):
        for name in order.sample(names, len(names)):
            began = time.perf_counter()
            result = ways[name]()
            seconds = time.perf_counter() - began
            if number >= 0:
                samples[name].append(seconds if result is None else result)
    return samples


def arguments(doc: str | None, *, runs: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs, help="rounds (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    return parser


@contextmanager
def home(place: str | None = None) -> Iterator[Path]:
    """A Stockade home of the benchmark's own, below `place`, gone at the end with whatever runs in it.

    An ordinary user's has its run-time directory on a tmpfs, where XDG_RUNTIME_DIR is by the XDG specification.
    """
    from stockade import contain

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with (
        tempfile.TemporaryDirectory(prefix="stockade-benchmark-", dir=place) as directory,
        tempfile.TemporaryDirectory(prefix="stockade-benchmark-", dir=MEMORY) as memory,
    ):
        own = {"STOCKADE_HOME": f"{directory}/home"}
        if os.geteuid() != 0:
            own = {"STOCKADE_HOME": "", "XDG_RUNTIME_DIR": memory}
            own |= {f"XDG_{part}_HOME": f"{directory}/home/{part.lower()}" for part in ("CONFIG", "DATA")}
        before = {name: os.environ.get(name) for name in own}
        os.environ |= own
        try:
            yield Path(directory)
        finally:
            for jail in contain.running():
                contain.stop(jail.instance, timeout_s=1)
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


def as_nobody(script: str, *options: str, timeout_s: float) -> list[Figure]:
    """The figures of a benchmark run as a user without a range of ids. Only root can do that."""
    with tempfile.TemporaryDirectory(prefix="stockade-benchmark-") as directory:
        os.chown(directory, NOBODY, NOBODY)
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "HOME": directory, "TMPDIR": directory,
            "XDG_RUNTIME_DIR": directory, "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--",
             sys.executable, script, "--json", *options],
            env=environment, cwd=directory, stdout=subprocess.PIPE, check=False, timeout=timeout_s,
        )  # fmt: skip
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"error: `{script}` as an ordinary user ended with status {done.returncode}")
    return [
        Figure(f"ordinary user, {found['name']}", found["value"], found["unit"], found["most"], found["least"])
        for found in json.loads(done.stdout)["figures"]
    ]


def execute(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Start a program as cheaply as can be and wait for it. SystemExit unless its status is 0."""
    pid = os.posix_spawn(argv[0], list(argv), dict(environment or {}))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        sys.exit(f"error: `{' '.join(argv)}` ended with status {status}")
