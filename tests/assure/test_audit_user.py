"""An ordinary user audits a jail whose files belong to other ids than the user's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build"))
import buildbench

SPEC = """
stockade = 1
name = "plain"
[service]
command = ["/usr/bin/true"]
user = "bob"
[limits]
memory = "64M"
processes = 10
[[accounts]]
name = "bob"
uid = 2000
[files.content]
"/etc/bobs" = "of the service\\n"
[files.owners]
"/etc/bobs" = "bob"
"""


@pytest.fixture(params=[65536, 0], ids=["with a range", "with one id"])
def user(request: pytest.FixtureRequest) -> Iterator[buildbench.User]:
    for home in buildbench.home():
        yield buildbench.User(home, count=request.param)


def test_audit_of_an_ordinary_users_jail_reads_all_of_it(user: buildbench.User) -> None:
    (user.home / "plain.toml").write_text(SPEC)
    built = user.run(sys.executable, "-m", "stockade", "build", "./plain.toml", "--no-observe", "--no-verify")
    assert built.returncode == 0, built.stderr
    done = user.run(sys.executable, "-m", "stockade", "audit", "plain", "--json")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    unchecked = {each["code"] for each in report["unchecked"]}
    assert report["examined"] > 10
    if (user.etc / "subuid").read_text():
        assert report["counts"] == {"NOT-ROOT": 1}
        assert [finding["path"] for finding in report["findings"]] == ["/etc/bobs"]
        assert "NOT-ROOT" not in unchecked
    else:
        assert report["counts"] == {}
        assert "NOT-ROOT" in unchecked
