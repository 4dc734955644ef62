"""Guests, their snapshots, and what is found out about them."""

from __future__ import annotations

from typing import Literal

import msgspec

from .publish import Published


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


NetworkMode = Literal["none", "publish", "nat"]


class Guest(_Record, frozen=True, kw_only=True):
    """A User-Mode Linux machine: an image and a copy-on-write disk of its own.

    memory in bytes. `walls`: "vm" alone, or behind a jail, and with one inside. `uid`, `gid`: who UML runs as, outside.
    `address`: the guest's number in its links. `links`: names of guests that it has a wire to. `booted`: it has been
    started before. `record`: what is executed and typed in it is kept outside of it. `kernel`: path of the UML
    kernel, "" for the host's default. `jail` and `generation`: what its image was made of, "" and 0 for another image.
    `maker`: pid and start time (proc(5), in ticks) of the process that removes it when it has ended, None: it stays.
    """

    name: str
    image: str
    image_sha256: str
    memory: int = 128 << 20
    walls: tuple[str, ...] = ("jail", "vm")
    network: NetworkMode = "none"
    publish: tuple[Published, ...] = ()
    links: tuple[str, ...] = ()
    uid: int
    gid: int
    kernel: str = ""
    created: float = 0.0
    booted: bool = False
    parent: str = ""
    record: bool = False
    jail: str = ""
    generation: int = 0
    maker: tuple[int, int] | None = None


class Snapshot(_Record, frozen=True, kw_only=True):
    """A kept state of a guest's disk. `digest` is that of the copy-on-write file's contents.

    consistent: the guest's file systems were synced and it stood still, or it was stopped.
    """

    name: str
    guest: str
    image: str
    image_sha256: str
    created: float
    state: Literal["running", "stopped"]
    consistent: bool
    digest: str
    bytes: int
    memory: int = 128 << 20
    good: bool = False


class GuestState(_Record, frozen=True, kw_only=True):
    """What a guest is now. Sizes in bytes; `memory_used` is what its processes hold on the host.

    `status` is its service's. `cause` of its last end: "halted", "killed", "failed", "memory" (its process went over
    the limit of the jail around it), "fault" (`fault` says which), "" before the first.
    """

    name: str
    image: str
    state: Literal["stopped", "running", "frozen"]
    walls: tuple[str, ...] = ()
    network: str = "none"
    pid: int | None = None
    memory: int = 0
    memory_used: int | None = None
    disk: int = 0
    snapshots: int = 0
    publish: tuple[str, ...] = ()
    status: int | None = None
    cause: str = ""
    fault: str = ""


class Change(_Record, frozen=True, kw_only=True):
    """One file that differs from the clean image. `notes`: why it deserves a look ("setuid", "new account")."""

    path: str
    kind: Literal["added", "changed", "removed"]
    type: str
    notes: tuple[str, ...] = ()


class EvidenceFile(_Record, frozen=True, kw_only=True):
    """One file of an evidence archive."""

    name: str
    bytes: int
    sha256: str


class EvidenceManifest(_Record, frozen=True, kw_only=True):
    """What an evidence archive holds. Times are seconds since 1970."""

    guest: str
    image: str
    image_sha256: str
    frozen: float
    written: float
    host: str
    files: tuple[EvidenceFile, ...]
    changes: tuple[Change, ...] = ()
    accounts: tuple[str, ...] = ()
    compared: bool = True


class TrialStep(_Record, frozen=True, kw_only=True):
    """A command of a trial and how it ended."""

    command: tuple[str, ...]
    status: int
    seconds: float
    output: str = ""


class PackageChange(_Record, frozen=True, kw_only=True):
    """A Debian package whose version a trial changed; "" for none."""

    package: str
    before: str
    after: str


class TrialReport(_Record, frozen=True, kw_only=True):
    """What a trial on a throw-away clone did."""

    guest: str
    steps: tuple[TrialStep, ...]
    exercises: tuple[TrialStep, ...]
    packages: tuple[PackageChange, ...]
    changes: tuple[Change, ...]
    passed: bool
    committed: bool = False


class GuestFinding(_Record, frozen=True, kw_only=True):
    """A result of the audit of a guest: what was seen, and the command that mends it ("" where none can)."""

    code: str
    severity: Literal["low", "medium", "high"]
    subject: str
    seen: str
    remedy: str = ""
