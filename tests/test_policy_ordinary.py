"""Policies of an ordinary user's jails: refusals are found out in the same way, without a right over the host."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "contain"))
import ordinary

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="another user is made for this: run the tests as root")

CODE = """
import json, msgspec
from stockade import specfile, workflow
from stockade.records.spec import Service, Spec
from stockade.why import why
given = Spec(name="box", service=Service(command=("/usr/bin/python3", "-c", "import os, socket"), user={user!r}))
report = workflow.build(given)
found = why("box", ("/usr/bin/python3", "-c", {code!r}))
print(json.dumps(msgspec.to_builtins((report.proposal, found))))
"""


@pytest.mark.parametrize(
    ("ranges", "user", "code", "toml"),
    [
        (True, "root", "import os; os.setuid(5)", '[policy]\ncapabilities = ["setuid"]'),
        (True, "nobody", "import socket; socket.socket(2, 3, 1)", '[policy]\ncapabilities = ["net_raw"]'),
        (False, "nobody", "import socket; socket.socket(16, 3, 16)", '[policy.syscalls]\nadd = ["netlink:generic"]'),
    ],
)
def test_refusal_in_an_ordinary_users_jail_is_named_with_its_line(
    ranges: bool, user: str, code: str, toml: str
) -> None:
    with ordinary.home(ranges=ranges) as place:
        done = ordinary.python(place, CODE.format(user=user, code=code))
    assert done.returncode == 0, done.stderr
    proposal, report = json.loads(done.stdout)
    assert (proposal["preset"], proposal["capabilities"]) == ("strict", [])
    assert (report["works"], report["works_with_lines"], report["toml"]) == (False, True, toml)
