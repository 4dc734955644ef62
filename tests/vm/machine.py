"""Guests of a tiny busybox image, and what the host sees of them: the oracle is outside of the guest."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade import machines, places
from stockade.records.guest import Guest
from stockade.records.image import Image, ImageStart
from stockade.vm import control, images, staging, store
from stockade.vm.start import Started

BUSYBOX = Path("/bin/busybox")
MEMORY = 64 << 20
APPLETS = (
    "[", "adduser", "awk", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "echo", "false", "free", "grep",
    "head", "hostname", "httpd", "id", "insmod", "ip", "kill", "ln", "ls", "mkdir", "mknod", "mount", "mv", "nc", "od",
    "ping", "poweroff", "ps", "rm", "seq", "setsid", "sh", "sha256sum", "sleep", "stat", "stty", "sync", "tail", "tee",
    "telnetd", "touch", "tr", "true", "tty", "umount", "uname", "wc", "wget", "yes",
)  # fmt: skip
PAGE = "a page from inside\n"

_NEEDED = (
    ("linux.uml", "user-mode-linux"), ("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("busybox", "busybox-static"),
)  # fmt: skip
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def needs(*programs: tuple[str, str]) -> None:
    """Skip where one of the programs is missing, with the package that brings it."""
    missing = sorted({package for program, package in programs if shutil.which(program, path=_PATH) is None})
    if missing:
        pytest.skip(f"not installed here: `apt-get install {' '.join(missing)}`")


def needs_uml() -> None:
    """Skip where no guest can be made."""
    needs(*_NEEDED)


def make_tree(root: Path, *, program: str = "") -> Path:
    """A root file system of busybox; `program` is the script /program."""
    for name in ("bin", "etc", "root", "srv", "tmp", "var"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/srv:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\ntty:x:5:\nwww:x:33:\n")
    (root / "etc/shadow").write_text("root:*:19000:0:99999:7:::\nwww:*:19000:0:99999:7:::\n")
    (root / "etc/shadow").chmod(0o600)
    (root / "srv/index.html").write_text(PAGE)
    if program:
        (root / "program").write_text(program)
        (root / "program").chmod(0o755)
    for directory in (root, *root.iterdir()):
        directory.chmod(0o755)
    return root


def make_image(name: str, root: Path, **start: object) -> Image:
    """The image `name` of the tree `root`; `start` are fields of its `ImageStart`."""
    record = Image(
        name=name,
        sha256="",
        size=0,
        mtime=0,
        origin="directory",
        source="busybox",
        start=ImageStart(**start),  # type: ignore[arg-type]
    )
    return staging.image_of(name, root, record)


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether the process runs: what its parent has not asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def inhabitants(namespace: str) -> list[int]:
    """Pids of what runs in the pid namespace of that name."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") == namespace and alive(int(entry)):
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def free_port() -> int:
    """A TCP port of loopback that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Seen:
    """What has been started, so that its end can be checked."""

    def __init__(self) -> None:
        self.namespaces: dict[str, str] = {}
        self.processes: dict[str, set[int]] = {}

    def note(self, name: str) -> None:
        """Remember the running guest `name`."""
        status = control.request(name, "status")
        self.namespaces[os.readlink(f"/proc/{status['pid']}/ns/pid")] = name
        keeper = parent(status["processes"][0])
        self.processes[name] = {keeper, *status["processes"], *status["helpers"]}

    def left(self) -> list[str]:
        """What there still is of the noted guests: their processes, in their namespace or beside it."""
        found = [f"{self.namespaces[space]}: pid {pid}" for space in self.namespaces for pid in inhabitants(space)]
        return found + [f"{name}: pid {pid}" for name, pids in self.processes.items() for pid in pids if alive(pid)]


def parent(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Guests:
    """Makes guests of a test and takes them away again."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.seen = Seen()
        self.before = set(store.names())

    def create(self, name: str, image: Image | None = None, **settings: object) -> Guest:
        """A guest of 64 MB behind the walls `vm` alone, unless `settings` say otherwise."""
        return store.create(name, image or self.image, **{"memory": MEMORY, "walls": ("vm",), **settings})

    def start(self, name: str, **options: bool) -> Started:
        """Start the guest `name` and let go of it."""
        started = machines.start_guest(name, **options)
        self.seen.note(name)
        return started

    def run(self, name: str, image: Image | None = None, **settings: object) -> Guest:
        """A guest that runs."""
        guest = self.create(name, image, **settings)
        self.start(name).close()
        return guest

    def end(self) -> None:
        """Remove every guest of the test."""
        for name in set(store.names()) - self.before:
            machines.discard(name)


def shell(name: str, text: str, **options: object) -> str:
    """Standard output of a shell script in the guest, which must succeed."""
    status, out, err = control.execute(name, ["/bin/sh", "-c", text], **options)  # type: ignore[arg-type]
    assert status == 0, f"{status}: {out!r} {err!r}"
    return out.decode()


def leftovers() -> list[str]:
    """What a test must not leave in the home: mounts, half-made files, sockets of guests."""
    home = os.environ["STOCKADE_HOME"]
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    found = [line for line in mounts if home in line]
    for directory in (places.images(), places.guests()):
        found += [str(path) for path in directory.glob(".*") if path.name != ".lock"]
    found += [str(path) for path in places.guests().glob("*/.*")]
    found += [str(path) for path in places.guests().glob("*/snapshots/.*")]
    return found + [str(path) for path in (places.run() / "@guests").glob("*/control")]


def blocks(path: Path) -> int:
    """Bytes that a file takes on the disk."""
    return path.stat().st_blocks * 512


def sha256(path: Path) -> str:
    """SHA-256 of a file, by reading all of it."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def tiny(name: str) -> Image:
    """The image `name` of the store."""
    return images.load(name)
