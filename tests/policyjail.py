"""What the tests of policies share: jails of a Python that makes the calls it is told to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import clihome

PYTHON = "/usr/bin/python3"

#: Everything that the snippets import; `call` makes a system call by its number on x86_64.
PRELUDE = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, subprocess, sys
_libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def python(code: str) -> list[str]:
    """The command that runs `code` behind the prelude."""
    return [PYTHON, "-c", PRELUDE + code]


def spec(name: str, code: str = "", *lines: str) -> str:
    """TOML of a jail whose command runs `code`; `lines` come after it."""
    return "\n".join([f'name = "{name}"', "[service]", f"command = {json.dumps(python(code))}", *lines, ""])


class Home(clihome.Home):
    """A home, and jails in it whose report is what counts."""

    def output(self, *words: str) -> str:
        """Standard output of `stockade WORDS`, which must succeed."""
        return self.good(*words).stdout

    def build(self, name: str, text: str) -> dict[str, Any]:
        """Write the spec `name`, build it, and return the report."""
        self.write(name, text)
        report: dict[str, Any] = json.loads(self.output("build", name, "--json"))
        return report

    def why(self, name: str, command: Sequence[str]) -> dict[str, Any]:
        """The report of `stockade why`."""
        report: dict[str, Any] = json.loads(self.output("why", name, "--json", "--", *command))
        return report


#: Why the tests with jails cannot be done here, "" if they can.
UNABLE = "" if os.geteuid() == 0 else "these jails run as root of their own: run the tests as root"
