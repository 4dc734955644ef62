"""A whole Debian system as an image, made by mmdebstrap(1), with or without root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from stockade import places
from stockade.errors import HostError, StateError, UsageError
from stockade.kernel import userns
from stockade.records.image import Image, ImageStart

from . import staging
from .systems import KEYS, SYSTEMS, System

__all__ = ["image_of_debian"]

_TIMEOUT_S = 1800
_WORD = re.compile(r"[a-z0-9][a-z0-9+.-]*\Z")
START = f"{staging.HOME}/start"
_LEAST = 512 << 20
_ROOM = 256 << 20
_TAIL = 1500

#: PID 1 runs it once. The services are those that Debian's packages enabled for multi-user operation.
_START = f"""\
#!/bin/sh
mkdir -p /run/lock /run/sshd /run/user
{KEYS}
for script in /etc/rc2.d/S*; do
    [ ! -x "$script" ] || "$script" start
done
exit 0
"""

#: Guests are started by the thousand from one image: nothing in it may identify a machine or hold a key.
_CLEANING = (
    'rm -f "$1"/etc/ssh/ssh_host_*_key* "$1"/var/lib/dbus/machine-id "$1"/etc/hostname',
    ': >"$1"/etc/machine-id',
    'rm -rf "$1"/var/log/bootstrap.log "$1"/var/log/dpkg.log "$1"/var/log/alternatives.log "$1"/var/log/apt',
    'rm -f "$1"/var/cache/ldconfig/aux-cache "$1"/etc/resolv.conf',
    'printf "127.0.0.1 localhost\\n" >"$1"/etc/hosts',
)


def image_of_debian(
    suite: str, name: str, *, packages: Sequence[str] = (), size: int | None = None, mirror: str = "",
    init: str = "", modules: Sequence[str] = (), say: Callable[[str], None] = lambda _: None,
) -> Image:  # fmt: skip
    """Make the image `name` of a Debian suite with `packages`. HostError without mmdebstrap, StateError when it fails.

    `mirror` is an address of an archive (default: the host's own, or Debian's). `size` in bytes (default: room for
    a quarter more). `init`: the system that is PID 1 and starts the services ("systemd"; default: Stockade's own).
    `modules`: kernel modules that its guests load, beside those that every image has.
    """
    system = SYSTEMS.get(init, System())
    if init not in ("", *SYSTEMS):
        raise UsageError(f"`{init}` cannot be PID 1 of a Debian image", hint=f"there is `{'`, `'.join(SYSTEMS)}`")
    packages = list(dict.fromkeys((*system.packages, *packages)))
    for word in (suite, *packages):
        if not _WORD.match(word):
            raise UsageError(f"`{word}` is no name of a suite or package", hint="as apt knows it: `nginx-light`")
    if shutil.which("mmdebstrap") is None:
        raise HostError("`mmdebstrap` is not installed", hint="`apt-get install mmdebstrap`")
    places.images().mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="stockade-debian-", dir="/var/tmp"))
    ids = None if os.geteuid() == 0 else userns.require_range()
    try:
        say(f"getting Debian {suite} with {len(packages)} packages")
        archive = scratch / "root.tar"
        _bootstrap(suite, packages, mirror, archive, system.hooks)
        say("making the file system")
        tree = scratch / "root"
        _as_root(ids, _unpack, archive, tree)
        used = archive.stat().st_size
        archive.unlink()
        own = ImageStart(program=START), [staging.Addition(path=START, mode=0o755, content=_START.encode())]
        start, additions = (system.start, system.additions()) if init else own
        record = Image(
            name=name, sha256="", size=0, mtime=0, origin="debian", source=f"{suite} {' '.join(packages)}".strip(),
            packages=tuple(packages), start=start,
        )  # fmt: skip
        return staging.image_of(
            name, tree, record, additions=additions, size=size or max(_LEAST, used + used // 4 + _ROOM),
            modules=modules,
        )  # fmt: skip
    finally:
        _as_root(ids, _remove, scratch)


def _bootstrap(suite: str, packages: Sequence[str], mirror: str, archive: Path, hooks: Sequence[str]) -> None:
    command = ["mmdebstrap", "--mode=unshare", "--variant=minbase", "--quiet",
               "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"]  # fmt: skip
    if packages:
        command.append(f"--include={','.join(packages)}")
    command += [f"--customize-hook={line}" for line in (*_CLEANING, *hooks)]
    command += ["--", suite, os.fspath(archive), *([mirror] if mirror else [])]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise StateError(f"`mmdebstrap` was not done after {_TIMEOUT_S} s", hint="look at the network") from error
    if done.returncode != 0:
        raise StateError(
            f"`mmdebstrap` failed: {done.stderr.strip()[-_TAIL:]}",
            hint="look at the names of suite and packages, and at the network; `--mirror` names another archive",
        )


def _as_root(ids: userns.Range | None, function: Callable[..., None], *arguments: object) -> None:
    if ids is None:
        function(*arguments)
    else:
        userns.call(function, *arguments, ids=ids)


def _unpack(archive: Path, tree: Path) -> None:
    tree.mkdir(mode=0o755)
    # Devices are made by the guest's own device file system; a user namespace could not make them.
    subprocess.run(
        ["tar", "--extract", "--file", os.fspath(archive), "--directory", os.fspath(tree), "--numeric-owner",
         "--same-permissions", "--xattrs", "--xattrs-include=security.capability", "--exclude=./dev/*"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=True,
    )  # fmt: skip


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
