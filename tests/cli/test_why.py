"""The verb why and the policy of explain, as they are read by people and by programs."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import msgspec
import pytest
from commandline import Run

from stockade.records import report as reports

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="these jails run as root of their own: run the tests as root")

SPEC = """
name = "box"

[service]
command = ["/usr/bin/python3", "-c", "import os, socket; os.close(socket.socket().detach())"]

[policy]
capabilities = []
"""


@pytest.fixture
def box(home: Path, stockade: Run) -> Run:
    (home / "config").mkdir(parents=True)
    (home / "config" / "box.toml").write_text(SPEC)
    assert stockade("build", "box").returncode == 0
    return stockade


def test_why_lists_each_refusal_with_its_line_and_all_lines_together(box: Run) -> None:
    done = box("why", "box", "--", "/usr/bin/python3", "-c", "import os; os.setuid(5)")
    assert done.returncode == 0
    assert done.stdout == (
        "box: 1 refused, and something failed: PermissionError: [Errno 1] Operation not permitted\n"
        "- setuid (EPERM): it needs the capability `setuid`\n"
        "    [policy] capabilities = [\"setuid\"]    # tried, it is allowed then\n"
        "\n"
        "all lines together (it works with those that could be tried):\n"
        "\n"
        "[policy]\n"
        "capabilities = [\"setuid\"]\n"
    )
    assert done.stderr.endswith("next: put the lines that it needs into the spec, then `stockade build box`\n")


def test_why_without_a_command_is_about_the_service(box: Run) -> None:
    done = box("why", "box", "--json")
    report = msgspec.json.decode(done.stdout, type=reports.WhyReport)
    assert (report.works, report.refusals) == (True, ())
    assert report.command[:2] == ("/usr/bin/python3", "-c")
    assert box("why", "box").stdout == "box: nothing was refused, and everything worked\n"


def test_why_asks_for_a_jail_that_is_built(box: Run) -> None:
    done = box("why", "bax")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no jail `bax`, did you mean `box`?\n")


def test_policy_is_toml_with_facts_as_comments(box: Run) -> None:
    done = box("explain", "box", "--policy")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout) == {"policy": {"syscalls": {"preset": "strict"}}}
    assert "# Capabilities: none.\n" in done.stdout


def test_policy_as_json_is_the_proposal_of_the_build(box: Run) -> None:
    built = json.loads(box("build", "box", "--json").stdout)["proposal"]
    report = msgspec.json.decode(box("explain", "box", "--policy", "--json").stdout, type=reports.PolicyReport)
    assert report.generation == 2
    assert json.loads(msgspec.json.encode(report.proposal)) == built


def test_build_says_in_a_line_which_policy_is_enough(box: Run) -> None:
    lines = box("build", "box").stdout.splitlines()
    [line] = [line for line in lines if line.startswith("policy that is enough: ")]
    assert line.startswith("policy that is enough: preset `strict`, not `default`, of which ")
    assert line.endswith("; capabilities none")
    assert "note: `stockade explain box --policy` has the lines for the spec" in lines


def test_policy_takes_no_path(box: Run) -> None:
    done = box("explain", "box", "/etc/passwd", "--policy")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: `--policy` is about the whole jail")
