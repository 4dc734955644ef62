"""Building the sshd and nginx jails: time beside jailkit's, time by stage, size and number of files, in one run.

    PYTHONPATH=src python3 benchmarks/build.py [--runs N] [--json]

Needs root, jailkit, OpenSSH, nginx and curl. The `stockade` that is timed is the command of a fresh virtual environment
of Debian's own Python, made as the README says (`pip install .`); `--command` names another. Both tools make the jail
anew each time, with the same programs: Stockade by `stockade build sshd --no-observe --no-verify` (files digested, the
result on disk at its end; the jail's keys are there from an earlier build, as jailkit makes none), jailkit by `jk_init`
for what its own configuration has a section for, and `jk_cp` for the programs. What was made is put aside and removed
at the end: ext4 passes over inodes that were freed within the last seconds, one by one, which would be measured too.
Before each turn all is written to the disk, or Stockade, which waits for that, would write what jailkit has left.
The jails of jailkit then get the recipe's configuration and must serve, in a chroot and a network of their own, before
their size counts.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure

from stockade import places, specfile
from stockade.records.spec import Spec

SECONDS = 10.0
#: jk_init refuses a jail below a directory that others may write to, as /tmp.
PLACE = "/var/lib"
#: Sections of jailkit's own configuration: what looks up names of users and hosts.
SECTIONS = ("uidbasics", "netbasics")
CONFIGURATION = "/etc/jailkit/jk_init.ini"
#: The `stockade` that is timed.
COMMAND = "stockade"


@dataclass(frozen=True)
class Service:
    """A recipe, and what a hand-made chroot needs beside it."""

    name: str
    paths: tuple[str, ...]
    accounts: tuple[str, ...]
    prepare: str
    serve: str


# $1 is the jail. A private host key and a client's key are made for it, as for ours.
SSHD = Service(
    "sshd", ("/usr/sbin/sshd",), ("root", "sshd", "nobody", "nogroup"),
    """
    mknod -m 666 "$1/dev/null" c 1 3
    mknod -m 666 "$1/dev/urandom" c 1 9
    mkdir -p "$1/run/sshd" "$1/etc/ssh" "$1/home/guest" "$1/etc/ssh/authorized_keys"
    chmod 755 "$1/run/sshd"
    echo 'guest:x:2000:2000::/home/guest:/usr/bin/bash' >>"$1/etc/passwd"
    echo 'guest:x:2000:' >>"$1/etc/group"
    ssh-keygen -q -t ed25519 -N '' -f "$1/etc/ssh/ssh_host_ed25519_key"
    ssh-keygen -q -t ed25519 -N '' -f "$2/client"
    cp "$2/client.pub" "$1/etc/ssh/authorized_keys/guest"
    """,
    """
    chroot "$1" /usr/sbin/sshd -D -e 2>"$2/log" &
    ask() {
        ssh -F none -n -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
            -o LogLevel=ERROR -i "$2/client" guest@127.0.0.1 'id -un'
    }
    expected=guest
    """,
)  # fmt: skip
NGINX = Service(
    "nginx", ("/usr/sbin/nginx", "/etc/nginx/mime.types"), ("root", "www-data", "nobody", "nogroup"),
    """
    mknod -m 666 "$1/dev/null" c 1 3
    mkdir -p "$1/run/nginx" "$1/etc/nginx/tls" "$1/srv/www" "$1/var/log/nginx" "$1/var/lib/nginx"
    openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost \
        -keyout "$1/etc/nginx/tls/key.pem" -out "$1/etc/nginx/tls/certificate.pem" 2>/dev/null
    """,
    """
    chroot "$1" /usr/sbin/nginx -c /etc/nginx/nginx.conf -e stderr 2>"$2/log" &
    ask() {
        curl -sS --fail http://127.0.0.1/ && curl -sS --fail -k https://127.0.0.1/
    }
    expected='*Served from a jail*Served from a jail*'
    """,
)  # fmt: skip

SERVING = """
set -e
ip link set lo up
{serve}
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    answer=$(ask "$1" "$2" 2>"$2/client-log") || true
    case $answer in $expected) exit 0 ;; esac
    sleep 0.2
done
cat "$2/log" "$2/client-log" >&2
exit 1
"""


def installed(directory: Path) -> str:
    """The command `stockade` of a virtual environment in `directory` that this source is installed in."""
    for command in (
        [measure.SYSTEM_PYTHON, "-m", "venv", str(directory)],
        [str(directory / "bin/pip"), "install", "--quiet", str(measure.SOURCE.parent)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0:
            sys.exit(f"error: `{' '.join(command)}`: {done.stderr}; `--command` names an installed `stockade`")
    return str(directory / "bin/stockade")


def stockade(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300
    )
    if done.returncode != 0:
        sys.exit(f"error: `stockade {' '.join(arguments)}`: {done.stderr}")
    return done


def jailkit(service: Service, spec: Spec, directory: Path) -> Path:
    """Make a jail with jailkit, of the programs that the recipe names."""
    jail = directory / "jail"
    jail.mkdir()
    programs = [*service.paths, *(shutil.which(name) or name for name in spec.files.programs)]
    basics = ["jk_init", "-c", CONFIGURATION, "-j", str(jail), *SECTIONS]
    for command in (basics, ["jk_cp", "-j", str(jail), *programs]):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode != 0 or "ERROR" in done.stderr:
            sys.exit(f"error: {command[0]}: {done.stdout}{done.stderr}")
    return jail


def serves(service: Service, spec: Spec, jail: Path, scratch: Path) -> None:
    """Give the jail its configuration, run the service in it and ask it; SystemExit when the answer is wrong."""
    for name in ("passwd", "group"):
        lines = Path(f"/etc/{name}").read_text().splitlines()
        wanted = [line for line in lines if line.split(":")[0] in service.accounts]
        (jail / "etc" / name).write_text("".join(f"{line}\n" for line in wanted))
    (jail / "dev").mkdir(exist_ok=True)
    subprocess.run(["sh", "-e", "-c", service.prepare, "sh", str(jail), str(scratch)], check=True, timeout=60)
    for path, content in spec.files.content.items():
        target = Path(f"{jail}{path}")
        if not content.count("${"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)
    script = SERVING.format(serve=service.serve)
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
         "sh", "-c", script, "sh", str(jail), str(scratch)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"error: the {service.name} of jailkit's jail does not serve: {done.stderr}")


def extent(root: Path) -> tuple[int, float]:
    """Number of regular files below `root`, and their MB; a file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for path, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            if stat.S_ISREG(status.st_mode):
                seen[status.st_dev, status.st_ino] = status.st_size
    return len(seen), sum(seen.values()) / 1e6


def timed(report: measure.Report, spec: Spec, directory: Path, runs: int) -> None:
    """Building without observing, beside jk_init."""
    work, aside = directory / "timed", directory / "aside"
    aside.mkdir()

    def put_aside(made: Path) -> None:
        made.rename(aside / str(time.monotonic_ns()))

    stockade("build", "sshd", "--no-observe", "--no-verify")
    jail, keys = places.jail("sshd"), directory / "keys"
    shutil.copytree(jail / "secrets", keys)

    def ours() -> float:
        put_aside(jail)
        shutil.copytree(keys, jail / "secrets")
        jail.chmod(0o700)
        os.sync()
        begun = time.perf_counter()
        stockade("build", "sshd", "--no-observe", "--no-verify")
        return time.perf_counter() - begun

    def theirs() -> float:
        work.mkdir()
        os.sync()
        begun = time.perf_counter()
        jailkit(SSHD, spec, work)
        seconds = time.perf_counter() - begun
        put_aside(work)
        return seconds

    ways: dict[str, Callable[[], float | None]] = {"stockade build": ours, "jailkit": theirs}
    group = "sshd without observing"
    report.add(group, measure.in_turn(ways, runs, warm=1), unit="s", scale=1.0)
    report.compare(group, "stockade build", "jailkit", most=0.5)
    stockade("rm", "--force", "sshd")


def whole(report: measure.Report, runs: int) -> None:
    """`build sshd` as a user has it, by stage."""
    stages: measure.Samples = {}

    def build() -> None:
        begun = time.perf_counter()
        found = json.loads(stockade("build", "sshd", "--json").stdout)
        for name, seconds in (*found["stages"].items(), ("together", time.perf_counter() - begun)):
            stages.setdefault(name, []).append(seconds)
        stockade("rm", "--force", "sshd")

    measure.in_turn({"build": build}, runs, warm=0)
    together = stages.pop("together")
    report.add("build sshd", stages, unit="s", scale=1.0)
    report.add("build sshd", {"together": together}, unit="s", scale=1.0)
    report.limit("build sshd: together", most=SECONDS)


def sizes(report: measure.Report, directory: Path) -> None:
    for service in (SSHD, NGINX):
        spec = specfile.load(specfile.find(service.name))
        work = directory / service.name
        work.mkdir()
        jail = jailkit(service, spec, work)
        serves(service, spec, jail, work)
        stockade("build", service.name)
        for tool, root in (("stockade", places.jail(service.name) / "current/rootfs"), ("jailkit", jail)):
            files, megabytes = extent(root)
            report.figures.append(measure.Figure(f"{service.name} by {tool}: files", files, ""))
            report.figures.append(measure.Figure(f"{service.name} by {tool}: size", megabytes, "MB"))


def main() -> int:
    global COMMAND
    parser = measure.arguments(__doc__, runs=5)
    parser.add_argument("--command", help="an installed `stockade`")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: run it as root: jk_init is root's")
    report = measure.Report("building jails")
    with measure.home(PLACE) as directory:
        directory.chmod(0o755)
        COMMAND = options.command or installed(directory / "environment")
        timed(report, specfile.load(specfile.find("sshd")), directory, options.runs)
        whole(report, max(1, options.runs // 2))
        sizes(report, directory)
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
