"""Drive Stockade as its users do, by its command line, and clients as the network would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stockade.records.spec import Exercise, Spec

SOURCE = Path(__file__).resolve().parents[2] / "src"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
REFERENCE = re.compile(r"\$\{(secret|secret-file|public):([^}]+)\}")

Done = subprocess.CompletedProcess[str]


def lacking(programs: Mapping[str, str]) -> str:
    """Why a test cannot run here, "" if it can. `programs` maps what is needed to the package that brings it."""
    missing = {package for program, package in programs.items() if shutil.which(program, path=SYSTEM_PATH) is None}
    return f"not installed here: `apt-get install {' '.join(sorted(missing))}`" if missing else ""


class Stockade:
    """The command line, with everything that it keeps below `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            "PATH": SYSTEM_PATH,
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(SOURCE),
            "STOCKADE_HOME": str(home),
        }

    def run(self, *words: str, timeout_s: float = 120, stdin: str | None = None) -> Done:
        """Run `stockade WORDS` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "stockade", *words],
            env=self.environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout_s,
            check=False,
        )

    def good(self, *words: str, timeout_s: float = 120, stdin: str | None = None) -> str:
        """Standard output of `stockade WORDS`, which must succeed."""
        done = self.run(*words, timeout_s=timeout_s, stdin=stdin)
        assert done.returncode == 0, f"`stockade {' '.join(words)}`: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def running(self) -> dict[str, int]:
        """Names of the running jails, and the pid on the host of each one's first process."""
        report = json.loads(self.good("ps", "--json"))
        return {entry["name"]: entry["pid"] for entry in report["jails"]}

    def secrets(self, name: str) -> Path:
        """Directory of the generated secrets of the jail `name`."""
        return self.home / "state" / "jails" / name / "secrets"


class Running:
    """A started jail, as its clients and the host see it."""

    def __init__(self, stockade: Stockade, spec: Spec, pid: int) -> None:
        self.stockade = stockade
        self.spec = spec
        self.pid = pid
        self.namespaces = {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("pid", "net", "mnt")}

    def fill(self, text: str) -> str:
        """`text` with each `${…}` filled in from what the jail was given."""

        def value(match: re.Match[str]) -> str:
            kind, secret = match[1], self.stockade.secrets(self.spec.name) / match[2]
            if kind == "secret-file":
                return str(secret / "value")
            return (secret / ("value" if kind == "secret" else "public")).read_text().rstrip("\n")

        return REFERENCE.sub(value, text)

    def client(self, exercise: Exercise, directory: Path) -> Done:
        """Do an exercise from the jail's network."""
        command = [self.fill(word) for word in exercise.command]
        return self.in_network(command, directory, stdin=self.fill(exercise.input or ""), timeout_s=exercise.timeout_s)

    def in_network(self, command: Sequence[str], directory: Path, *, stdin: str = "", timeout_s: float = 20) -> Done:
        """Run a program of the host's in the jail's network namespace."""
        environment = {"PATH": SYSTEM_PATH, "HOME": str(directory), "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *command],
            env={**environment, "STOCKADE_ROOT": f"/proc/{self.pid}/root"},
            cwd=directory,
            input=stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout_s,
            check=False,
        )

    def processes(self) -> dict[int, dict[str, str]]:
        """Lines of /proc/PID/status of each process of the jail, by its pid on the host."""
        return {int(process.name): status(process) for process in inhabitants("pid", self.namespaces["pid"])}

    def leftovers(self) -> list[str]:
        """What there still is of a jail that has ended: processes, mounts, users of its namespaces."""
        left = [
            f"process {process.name} is in its {kind} namespace"
            for kind, name in self.namespaces.items()
            for process in inhabitants(kind, name)
        ]
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        return left + [f"mount {line}" for line in mounts if str(self.stockade.home) in line]


def inhabitants(kind: str, name: str) -> list[Path]:
    """Directories in /proc of the processes in the namespace `name`, as readlink(2) gives it, of a kind."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if os.readlink(process / "ns" / kind) == name:
                found.append(process)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except PermissionError:
            continue  # root may look into every process of a jail: this one is none
    return found


def status(process: Path) -> dict[str, str]:
    """The fields of the file `status` of a directory of proc(5)."""
    lines = (process / "status").read_text(errors="replace").splitlines()
    return {key: rest.strip() for key, _, rest in (line.partition(":") for line in lines)}


def failure(exercise: Exercise, done: Done) -> str:
    """Why `done` does not fulfil `exercise`, "" if it does."""
    problem = ""
    if exercise.refused and done.returncode == 0:
        problem = "succeeded, and must be refused"
    elif not exercise.refused and done.returncode != exercise.status:
        problem = f"status {done.returncode}, not {exercise.status}"
    elif exercise.stdout is not None and not re.search(exercise.stdout, done.stdout):
        problem = f"its output does not hold {exercise.stdout!r}"
    return problem and f"{exercise.name}: {problem}\nstdout: {done.stdout}\nstderr: {done.stderr}"
