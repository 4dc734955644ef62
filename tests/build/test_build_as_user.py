from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import buildbench

SESSION = str(Path(__file__).with_name("user_session.py"))


def session(user: buildbench.User, **environment: str) -> dict[str, Any]:
    done = user.python(f"import runpy; runpy.run_path({SESSION!r}, run_name='__main__')", **environment)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_user_with_a_range_builds_what_root_builds(user: buildbench.User) -> None:
    report = session(user)
    assert "error" not in report, report
    assert report["same"]
    assert report["verified"] == []
    assert report["owners"]["/usr/bin/true"] == [0, 0]
    assert report["owners"]["/srv"] == [2000, 2000]
    assert report["owners"]["/etc/k"] == [2000, 2000]
    assert report["owners"]["/data"] == [buildbench.UID, 0]
    first = [buildbench.FIRST_UID, buildbench.FIRST_GID]
    assert report["on disk"]["/"] == report["on disk"]["/etc/passwd"] == first
    assert report["on disk"]["/data"] == [buildbench.FIRST_UID + buildbench.UID, buildbench.FIRST_GID]
    assert report["mode of data"] == "0o400"
    assert report["swept"] == 1
    assert report["generations"] == [3, 4, 5]
    assert report["left"] == [0]
    assert report["children"] == ["ps"]


def test_a_user_without_a_range_builds_for_one_id(user_without_range: buildbench.User) -> None:
    report = session(user_without_range, SERVICE_USER="bob")
    assert "error" not in report, report
    assert report["same"]
    assert report["verified"] == []
    assert set(map(tuple, report["owners"].values())) == {(2000, 2000)}
    assert set(map(tuple, report["on disk"].values())) == {(buildbench.UID, buildbench.UID)}
    assert report["generations"] == [3, 4, 5]
    assert report["left"] == [0]


def test_a_service_that_is_root_needs_a_range(user_without_range: buildbench.User) -> None:
    report = session(user_without_range)
    assert report["kind"] == "HostError"
    assert report["error"] == (
        "the service runs as root, and the jail has only one id: that of the caller, who must not be root inside"
    )
    assert "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 walluser" in report["hint"]


def test_further_groups_of_a_service_need_a_range(
    user_without_range: buildbench.User, user: buildbench.User
) -> None:
    report = session(user_without_range, SERVICE_USER="bob", SERVICE_GROUPS="mail")
    assert report["kind"] == "HostError"
    assert report["error"] == (
        "the service has further groups in `service.groups`, and the jail has only one group id, the caller's"
    )
    assert report["hint"] == (
        "as root: `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 walluser` "
        "(any 65536 ids that nobody else has); or leave `service.groups` out"
    )
    assert "error" not in session(user, SERVICE_USER="bob", SERVICE_GROUPS="mail")
