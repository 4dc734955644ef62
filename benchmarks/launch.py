"""What a launch costs: `/bin/true` behind all walls, beside bubblewrap, a bare interpreter and firejail, in one run.

    PYTHONPATH=src python3 benchmarks/launch.py [--runs N] [--json]

Run it as root: the part for an ordinary user (without a range of ids) is then run as `nobody`. The jail has all
namespaces, seccomp, Landlock and no capability; bubblewrap gets `--unshare-all` over the same root file system, with a
/proc, a /dev and two tmpfs as the jail has them; `bare` is without those. The ways take turns; medians.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import msgspec

from stockade import Jail, Pool, places, workflow
from stockade.contain import warden_path
from stockade.records.spec import Spec

TRUE = "/bin/true"
BWRAP = "/usr/bin/bwrap"
SIZES_MB = (10, 1000)


def jail(name: str = "true", **directory: str) -> Path:
    """Build the jail, with one directory where something is said of it; the directory of its generation.

    It has run once, which makes its volumes.
    """
    spec = {"name": name, "service": {"command": [TRUE], "user": "nobody"}, "policy": {"proc": "pid"}}
    written = {"directories": {"/srv": directory}} if directory else {}
    workflow.build(msgspec.convert(spec | written, Spec), observe=False, verify=False)
    Jail(name).run([TRUE]).check()
    return Path(os.path.realpath(places.jail(name) / "current"))


def volumes(report: measure.Report, runs: int) -> None:
    """What it costs to have a volume, and one with a size, which is mounted and unmounted with the jail."""
    ways = {
        name: partial(measure.execute, [warden_path(), str(jail(name, kind="volume", **size) / "plan")])
        for name, size in (("directory", {}), ("64m", {"size": "64M"}))
    }  # fmt: skip
    report.add("with a volume", measure.in_turn(dict(ways), runs))
    report.compare("with a volume", "64m", "directory")


def bubblewrap(root: str) -> tuple[list[str], list[str]]:
    """The command alike, and the bare one."""
    bind = [BWRAP, "--unshare-all", "--ro-bind", root, "/"]
    alike = [*bind, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "--tmpfs", "/tmp", "--", TRUE]
    return alike, [*bind, "--", TRUE]


def command(directory: Path) -> str:
    """A `stockade` as an editable installation has it."""
    venv.create(directory, with_pip=False, symlinks=True)
    library = next((directory / "lib").glob("python3*/site-packages"))
    (library / "_stockade.pth").write_text(f"{measure.SOURCE}\n")
    script = directory / "bin/stockade"
    script.write_bytes((measure.SOURCE.parent / "bin/stockade").read_bytes())
    script.chmod(0o755)
    return str(script)


def check(completed: object, status: int) -> None:
    if status != 0:
        sys.exit(f"error: a launch failed: {completed}")


def api(target: Jail | Pool) -> None:
    done = target.run() if isinstance(target, Pool) else target.run([TRUE])
    check(done, done.status)


def theirs(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, check=False)
    check(done, done.returncode)


def pooled(pool: Pool) -> float:
    """Seconds until the result is there; the next jail is prepared outside of that time."""
    began = time.perf_counter()
    api(pool)
    seconds = time.perf_counter() - began
    pool.fill()
    return seconds


def from_python(report: measure.Report, alike: list[str], runs: int) -> None:
    """From processes of several sizes: the memory is touched, so that a fork would have to copy its tables."""
    for size in SIZES_MB:
        ballast = bytearray(size << 20)
        ballast[::4096] = b"x" * len(ballast[::4096])
        group = f"from Python, {size} MB"
        with Pool("true", [TRUE], size=2) as pool:
            ways: dict[str, Callable[[], float | None]] = {
                "Jail.run": partial(api, Jail("true")),
                "Pool.run": partial(pooled, pool),
                "subprocess.run bwrap": partial(theirs, alike),
            }
            report.add(group, measure.in_turn(ways, runs))
        del ballast
        report.compare(group, "Jail.run", "subprocess.run bwrap", most=1.0)
        report.compare(group, "Pool.run", "subprocess.run bwrap", most=0.5)


def main() -> int:
    options = measure.arguments(__doc__, runs=100).parse_args()
    report = measure.Report("launch of /bin/true")
    with measure.home() as directory:
        generation = jail()
        alike, bare = bubblewrap(f"{generation}/rootfs")
        warden = [warden_path(), str(generation / "plan")]
        ways: dict[str, Callable[[], float | None]] = {
            "warden": partial(measure.execute, warden),
            "bwrap": partial(measure.execute, alike),
            "bwrap bare": partial(measure.execute, bare),
        }
        report.add("launch", measure.in_turn(ways, options.runs))
        report.compare("launch", "warden", "bwrap", most=1.0)
        report.compare("launch", "warden", "bwrap bare")
        if os.geteuid() == 0:
            volumes(report, options.runs)
        from_python(report, alike, options.runs)
        environment = dict(os.environ)
        stockade = [command(directory / "venv"), "run", "true", "--", "true"]
        measure.execute(stockade, environment)
        ways = {
            "stockade run": partial(measure.execute, stockade, environment),
            "python3 -I -S": partial(measure.execute, [measure.SYSTEM_PYTHON, "-I", "-S", "-c", "pass"], environment),
        }
        if os.path.exists("/usr/bin/firejail") and os.geteuid() == 0:
            firejail = ["/usr/bin/firejail", "--quiet", "--noprofile", "true"]
            ways["firejail --noprofile"] = partial(measure.execute, firejail, environment)
        report.add("command", measure.in_turn(ways, options.runs))
        report.compare("command", "stockade run", "python3 -I -S", most=2.5)
        if "firejail --noprofile" in ways:
            report.compare("command", "stockade run", "firejail --noprofile", most=1.0)
    if os.geteuid() == 0:
        report.figures += measure.as_nobody(__file__, "--runs", str(options.runs), timeout_s=600)
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
