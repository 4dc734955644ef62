"""What a Debian image with a PID 1 of its own needs, as data: packages, files, and how its guests start."""

from __future__ import annotations

import msgspec

from stockade.records.image import ImageStart

from .staging import Addition

__all__ = ["KEYS", "SYSTEMS", "System"]

#: Keys belong to one machine: the image has none, and each guest makes its own, of the kinds that take no time.
KEYS = """\
if [ -d /etc/ssh ] && command -v ssh-keygen >/dev/null; then
    for kind in ed25519 ecdsa; do
        [ -e /etc/ssh/ssh_host_${kind}_key ] || ssh-keygen -q -t $kind -N '' -f /etc/ssh/ssh_host_${kind}_key
    done
fi"""

_KEYS_PROGRAM = "/.stockade/keys"
_UNITS = "/etc/systemd/system"
_MASKED = ("getty@.service", "modprobe@.service", "systemd-modules-load.service", "e2scrub_reap.service")


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A system that is PID 1. `programs` and `files`: text by path; `hooks`: commands for mmdebstrap(1)."""

    packages: tuple[str, ...] = ()
    start: ImageStart = ImageStart()
    programs: dict[str, str] = {}
    files: dict[str, str] = {}
    hooks: tuple[str, ...] = ()

    def additions(self) -> list[Addition]:
        """Its programs and files as an image takes them."""
        return [
            Addition(path=path, mode=mode, content=text.encode())
            for mode, texts in ((0o755, self.programs), (0o644, self.files))
            for path, text in texts.items()
        ]


#: The management console's `cad` is Ctrl-Alt-Del, by which systemd would start the machine again. UML has no virtual
#: terminal beside its console, no logical volumes to check, and no module is loaded once the warden has made way.
SYSTEMS = {
    "systemd": System(
        packages=("systemd-sysv", "dbus"),
        start=ImageStart(system="/lib/systemd/systemd", options=("systemd.show_status=1",), stop_ms=60000),
        programs={_KEYS_PROGRAM: f"#!/bin/sh\n{KEYS}\n"},
        files={
            f"{_UNITS}/stockade-keys.service": f"""\
[Unit]
Description=Keys of this machine's own
ConditionPathExists=/etc/ssh
Before=ssh.service

[Service]
Type=oneshot
ExecStart={_KEYS_PROGRAM}
""",
        },
        hooks=(
            f'ln -s /lib/systemd/system/poweroff.target "$1"{_UNITS}/ctrl-alt-del.target',
            *(f'ln -s /dev/null "$1"{_UNITS}/{unit}' for unit in _MASKED),
            f'mkdir -p "$1"{_UNITS}/ssh.service.wants "$1"{_UNITS}/multi-user.target.wants',
            f'ln -s ../stockade-keys.service "$1"{_UNITS}/ssh.service.wants/',
            f'ln -s /lib/systemd/system/console-getty.service "$1"{_UNITS}/multi-user.target.wants/',
        ),
    ),
}
