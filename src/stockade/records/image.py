"""Images: a root file system in one file, read-only once made."""

from __future__ import annotations

from typing import Literal

import msgspec


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


class ImageStart(_Record, frozen=True, kw_only=True):
    """How a guest of an image starts; the first given of `plan`, `program` and `init` says with what.

    plan: path in the image of a launch plan for the service, by the walls that stand inside ("vm": none, "jail").
    mounts: path of a plan with the file systems to mount for walls "vm". program: path of a program that is run
    after the boot. init: the program that is PID 1, where the image brings its own. system: a systemd, which the warden
    becomes once the network is up; a child of it serves the line, and the guest is up when systemd says so. options:
    words for the kernel's command line. stop_signal and stop_ms: how the service is told to end, and for how long it or
    the system is waited for. end: the guest ends with its service.
    """

    plan: dict[str, str] = {}
    mounts: str = ""
    program: str = ""
    init: str = "/.stockade/init"
    system: str = ""
    options: tuple[str, ...] = ()
    stop_signal: int = 15
    stop_ms: int = 10000
    end: bool = False

    @property
    def has_line(self) -> bool:
        """Whether the warden starts the guest: commands, files and the service's status go over its serial line."""
        return self.init == "/.stockade/init"


class Image(_Record, frozen=True, kw_only=True):
    """An image in the store.

    `sha256` is of the whole file, holes as zeros. `size` in bytes is the disk's, `mtime` the time that the file always
    has: it comes from the digest, so a copy-on-write file is never used with another base. `quarantine`: the first
    boot is a throw-away one without a network. `created` in seconds since 1970. `ready_tcp`: its service is up when
    this port is open, which takes at most `ready_s` seconds. `publish` as in a spec. `secrets`: it holds generated keys
    or passwords, so it is not exported.
    """

    name: str
    sha256: str
    size: int
    mtime: int
    origin: Literal["directory", "jail", "debian", "import", "guest"]
    source: str = ""
    created: float = 0.0
    start: ImageStart = ImageStart()
    packages: tuple[str, ...] = ()
    kernel: str = ""
    quarantine: bool = False
    ready_tcp: int | None = None
    ready_s: float = 30.0
    publish: tuple[str, ...] = ()
    secrets: bool = False
    exercises: tuple[tuple[str, ...], ...] = ()
