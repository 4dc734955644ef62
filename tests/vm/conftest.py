"""A home with a small image of busybox, made once; guests of it that are gone when their test is."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import Guests, leftovers, make_image, make_tree, needs, needs_uml, until

from stockade import machines, places
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.vm import debian, images, staging, store
from stockade.vm.start import Started

BUSYBOX = Path("/bin/busybox")
APPLETS = (
    "awk", "cat", "chmod", "cp", "dd", "echo", "env", "false", "free", "grep", "head", "httpd", "id", "ifconfig",
    "kill", "ln",
    "ls", "mkdir", "mknod", "mount", "nc", "ping", "ps", "rm", "route", "sed", "seq", "sh", "sleep", "stat", "stty",
    "sync", "tail", "touch", "tr", "true", "tty", "uname", "wc", "yes",
)  # fmt: skip
MEMORY = 64 << 20

NewGuest = Callable[..., Guest]
_number = itertools.count()


def busybox_tree(root: Path) -> Path:
    """A root file system of busybox."""
    for name in ("bin", "etc", "root", "tmp", "var", "srv"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nwww:x:33:33::/srv:/bin/sh\n")
    (root / "etc/shadow").write_text("root:*:19000::::::\nwww:!:19000::::::\n")
    (root / "srv/index.html").write_text("served from a guest\n")
    (root / "bin/ping").unlink()
    return root


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """STOCKADE_HOME of these tests."""
    place = tmp_path_factory.mktemp("guests")
    before = os.environ.get("STOCKADE_HOME")
    os.environ["STOCKADE_HOME"] = str(place)
    yield place
    for name in store.names():
        machines.discard(name)
    if before is None:
        del os.environ["STOCKADE_HOME"]
    else:
        os.environ["STOCKADE_HOME"] = before


@pytest.fixture(scope="package")
def tree(home: Path) -> Path:
    """The tree that the image is made of."""
    return busybox_tree(home / "tree")


@pytest.fixture(scope="package")
def image(tree: Path) -> Image:
    """The image `small`."""
    record = Image(name="small", sha256="", size=0, mtime=0, origin="directory", source="tree")
    return staging.image_of("small", tree, record)


@pytest.fixture
def new_guest(image: Image) -> Iterator[NewGuest]:
    """Make guests of the image; they are ended and removed after the test."""
    made: list[str] = []

    def make(**settings: object) -> Guest:
        name = str(settings.pop("name", f"g{next(_number)}"))
        made.append(name)
        wanted = {"memory": MEMORY, "walls": ("vm",), **settings}
        return store.create(name, image, **wanted)

    yield make
    for name in made:
        if (places.guest(name) / "guest.json").exists():
            machines.discard(name)


@pytest.fixture
def guest(new_guest: NewGuest) -> Guest:
    """One guest, stopped."""
    return new_guest()


@pytest.fixture
def running(guest: Guest) -> Guest:
    """One guest that runs."""
    machines.start_guest(guest.name).close()
    return guest


@pytest.fixture
def start() -> Callable[[str], Started]:
    """Start a guest and let it go on alone."""

    def begin(name: str) -> Started:
        started = machines.start_guest(name)
        started.close()
        return started

    return begin


@pytest.fixture(autouse=True)
def keep_home(home: Path) -> None:
    """Every test of this package works in that home."""


def image_file(image: Image) -> Path:
    """The file of an image."""
    return images.file(image.name)


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, with nothing in it."""
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="package")
def tiny_image(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image `tiny`: busybox with more of its programs."""
    needs_uml()
    if os.geteuid() != 0:
        pytest.skip("run as root: its guests get ids of their own; an ordinary user's are in test_ordinary_guests.py")
    return make_image("tiny", make_tree(tmp_path_factory.mktemp("tiny") / "root"))


@pytest.fixture(scope="package")
def system_image(home: Path) -> Iterator[Image]:
    """The image `system`: Debian with systemd, and with what Stockade needs in it."""
    needs_uml()
    needs(("mmdebstrap", "mmdebstrap"))
    if os.geteuid() != 0:
        pytest.skip("run as root: its guests get ids of their own")
    packages = ["libpam-systemd", "openssh-server", "procps", "python3", "strace", "uidmap"]
    yield debian.image_of_debian("bookworm", "system", packages=packages, init="systemd", modules=["overlay"])
    images.remove("system", [])


@pytest.fixture
def guests(tiny_image: Image) -> Iterator[Guests]:
    """Makes guests; after the test none of them, no process of theirs and nothing half made may be left."""
    made = Guests(tiny_image)
    try:
        yield made
    finally:
        made.end()
    assert until(lambda: not made.seen.left()), made.seen.left()
    assert leftovers() == []
