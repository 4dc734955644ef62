"""What the benchmarks of guests share: a tiny image, a nginx jail, guests that are gone at the end."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import measure

from stockade import machines, specfile, workflow
from stockade.records.image import Image, ImageStart
from stockade.records.publish import Published
from stockade.records.spec import Spec
from stockade.vm import staging, store
from stockade.vm.start import Started

HOST = "127.0.0.1"
MEMORY = 64 << 20
LIMIT_S = 20.0
NGINX = "nginx"
BUSYBOX = Path("/bin/busybox")
APPLETS = ("cat", "dd", "echo", "free", "head", "httpd", "sh", "sha256sum", "sleep", "true", "wget")


def need(*programs: str) -> None:
    """End with the names of what is missing."""
    if os.geteuid() != 0:
        sys.exit("error: needs root")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        sys.exit(f"error: not installed: {', '.join(missing)}")


@contextmanager
def home() -> Iterator[Path]:
    """A home of the benchmark's own; guests that are left in it are ended and removed."""
    with measure.home() as directory:
        try:
            yield directory
        finally:
            for name in store.names():
                machines.discard(name)


def tree(root: Path) -> Path:
    """A root file system of busybox."""
    for name in ("bin", "etc", "srv", "tmp", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    for directory in (root, *root.iterdir()):
        directory.chmod(0o755)
    return root


def image(name: str, root: Path, *, size: int | None = None, **start: object) -> Image:
    """The image `name` of a directory."""
    record = Image(
        name=name, sha256="", size=0, mtime=0, origin="directory", start=ImageStart(**start)  # type: ignore[arg-type]
    )
    return staging.image_of(name, root, record, size=size)


def nginx() -> Spec:
    """The recipe's spec."""
    return specfile.load(specfile.recipe(NGINX))


def build_nginx() -> None:
    """The jail of the recipe nginx."""
    workflow.build(nginx(), verify=False)


def run(name: str, of: Image, walls: tuple[str, ...], **settings: object) -> Started:
    """Make and start a guest."""
    store.create(name, of, **{"memory": MEMORY, "walls": walls, **settings})
    return machines.start_guest(name)


def published(target: int) -> Published:
    """A free port of loopback that leads to `target`."""
    with socket.create_server((HOST, 0)) as probe:
        return Published(address=HOST, port=int(probe.getsockname()[1]), target=target)


def first_answer(port: int, began: float) -> float:
    """Seconds from `began` until a GET is answered with 200."""
    while time.perf_counter() - began < LIMIT_S:
        connection = http.client.HTTPConnection(HOST, port, timeout=2)
        try:
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return time.perf_counter() - began
        except (OSError, http.client.HTTPException):
            time.sleep(0.002)
        finally:
            connection.close()
    sys.exit(f"error: no answer on port {port} within {LIMIT_S:g} s")
