"""Small jails of busybox, made directly: the build has its own tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from stockade import contain, places
from stockade.build.lock import encode as encode_lock
from stockade.contain.resizing import catch_up
from stockade.errors import NotFoundError
from stockade.records.lock import Lock, LockDirectory, LockedSpec, LockEntry
from stockade.records.spec import Spec

BUSYBOX = Path("/bin/busybox")
APPLETS = (
    "cat", "chmod", "cp", "dd", "echo", "false", "grep", "head", "hostname", "id", "kill", "logger", "ls", "mknod",
    "mount", "nc", "od", "readlink", "seq", "setsid", "sh", "sleep", "stat", "stty", "touch", "true", "tty", "umount",
)  # fmt: skip
_DIRECTORIES = (
    "bin", "dev", "etc", "proc", "tmp", "run", "root", "var", "var/lib", "var/lib/data", "mnt", "home", "usr",
)  # fmt: skip
PASSWD = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var/lib/data:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
GROUP = "root:x:0:\ntty:x:5:\nwww:x:33:\nlogs:x:44:www\nnogroup:x:65534:\n"


def make_rootfs(root: Path) -> None:
    """A rootfs of busybox and a few directories."""
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    (root / "var/lib/data/seed").write_text("from the rootfs\n")
    for name in ("lib", "lib64"):  # for a jail that has the host's /usr
        (root / name).symlink_to(f"usr/{name}")
    (root / "escape").symlink_to("/../../../../etc")
    os.chmod(root, 0o755)


def make_lock(**changes: object) -> Lock:
    fields: dict[str, object] = {
        "spec": LockedSpec(name="test", sha256="0" * 64),
        "architecture": os.uname().machine,
        "entries": tuple(LockEntry(path=f"/{name}", type="directory", mode=0o755) for name in _DIRECTORIES),
        "directories": (
            LockDirectory(path="/run", mode=0o755),
            LockDirectory(path="/run/www", mode=0o750, uid=33, gid=33),
            LockDirectory(path="/tmp", mode=0o1777),
        ),
        "proc": "full",
    }
    return Lock(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Stockade home of the test's own; whatever still runs in it is ended."""
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    for jail in contain.running():
        with contextlib.suppress(NotFoundError):  # it may be ending just now
            contain.stop(jail.instance, timeout_s=0.2)


def build(name: str, spec: dict[str, object], lock: Lock, *, volumes: bool = True) -> Path:
    """A generation of the jail `name`, current, with its plan, and with the volumes that its first launch makes."""
    generation = places.jail(name) / "generations" / "0001"
    make_rootfs(generation / "rootfs")
    full = msgspec.convert({"name": name, "service": {"command": ["/bin/sh"]}} | spec, Spec)
    contain.install(full, lock, generation=generation)
    (generation / "spec.json").write_bytes(msgspec.json.encode(full))
    (generation / "lock.json").write_bytes(encode_lock(lock))
    (places.jail(name) / "current").symlink_to("generations/0001")
    if volumes:
        catch_up(generation, name)
    return generation


Builder = Callable[..., Path]


@pytest.fixture
def jail(home: Path) -> Builder:
    """Builds a jail: `jail("name", {spec}, lock fields…)`; needs root and busybox."""
    if os.geteuid() != 0:
        pytest.skip("run as root: the jail gets ids of its own")
    if not BUSYBOX.exists():
        pytest.skip("`apt-get install busybox-static`: the jails of these tests hold nothing else")

    def make(name: str = "test", spec: dict[str, object] | None = None, **lock: object) -> Path:
        return build(name, spec or {}, make_lock(**lock))

    return make


def output(name: str, *argv: str, **options: object) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command in a jail of its own."""
    with contain.launch(
        name, argv=argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options  # type: ignore[arg-type]
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        out = running.stdout.read()
        err = running.stderr.read()
        return running.wait(20), out.decode(), err.decode()
