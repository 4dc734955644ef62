"""Each rule has a tree that breaks it, and one that is like it and does not."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from audit_table import (
    ELSEWHERE,
    KEY,
    RULES,
    SETUID_FILE,
    UNUSED,
    USED,
    accounts,
    both,
    file,
    host_package,
    link,
    node,
    on_host,
    tool,
)  # fmt: skip
from audit_trees import PLAIN, SPEC, Tree, found

from stockade.assure import audit
from stockade.records.spec import Account


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files other owners and make device nodes")
    return Tree.new(tmp_path)


def test_every_rule_has_its_trees() -> None:
    assert RULES.keys() | ELSEWHERE == audit.rules().keys()


def test_plain_tree_and_plain_jail_have_no_finding(tree: Tree) -> None:
    assert tree.audit().findings == ()
    tree.as_jail()
    report = tree.audit()
    assert report.findings == ()
    assert report.score == 100.0


@pytest.mark.parametrize("code", RULES)
def test_rule_is_broken_by_its_tree(tree: Tree, code: str) -> None:
    RULES[code][0](tree)
    report = tree.audit()
    assert report.counts.get(code, 0) >= 1, report.findings
    assert report.score < 100


@pytest.mark.parametrize("code", RULES)
def test_rule_is_kept_by_the_tree_beside_it(tree: Tree, code: str) -> None:
    RULES[code][1](tree)
    report = tree.audit()
    assert code not in report.counts, report.findings


@pytest.mark.parametrize(("version", "says"), [("2-1", "the host has 2-1 now"), (None, "which the host no longer has")])
def test_stale_file_of_a_jail_names_its_package_and_both_versions(tree: Tree, version: str | None, says: str) -> None:
    tree.as_jail()
    tree.write("/usr/bin/tool", "old", mode=0o555)
    tree.evidence["/usr/bin/tool"] = USED
    tree.packages["/usr/bin/tool"] = "sample"
    if version is not None:
        host_package(tree, "/usr/bin/tool\n", version=version)
    on_host(tree, "/usr/bin/tool", "new")
    [stale] = tree.audit().findings
    assert (stale.code, stale.path) == ("STALE", "/usr/bin/tool")
    assert stale.message == f"from sample 1-1, {'and ' if version else ''}{says}: the host's file is another one"


@pytest.mark.parametrize("what", KEY)
def test_each_kind_of_secret_is_recognised_and_never_shown(tree: Tree, what: str) -> None:
    tree.write("/srv/x", "first line\n" + KEY[what])
    report = tree.audit()
    messages = [finding.message for finding in report.findings if finding.path == "/srv/x"]
    assert messages == [f"{what}, in line {_line(what)}"]
    assert "Ab3Ab3" not in str(report)


def _line(what: str) -> int:
    return 3 if what == "a private key of WireGuard" else 2


@pytest.mark.parametrize(
    "command",
    [
        ("openssl", "genpkey", "-algorithm", "ED25519", "-out"),
        ("openssl", "genrsa", "-traditional", "-aes128", "-passout", "pass:word", "-out"),
        ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"),
        ("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "a long word", "-f"),
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_keys_that_real_programs_make_are_found(tree: Tree, command: tuple[str, ...]) -> None:
    place = tree.directory("/keys") / "key"
    subprocess.run([*command, str(place)], check=True, capture_output=True, timeout=30)
    assert found(tree.audit(), "PRIVATE-KEY") == ["/keys/key"]


def test_reason_of_the_spec_accepts_presence_and_nothing_else(tree: Tree) -> None:
    tree.as_jail(files=msgspec.structs.replace(SPEC.files, reasons={"/usr/bin/dash": "the service's menu"}))
    tree.write("/usr/bin/dash", "x", mode=0o757)
    tree.evidence["/usr/bin/dash"] = UNUSED
    on_host(tree, "/usr/bin/dash", "x")
    report = tree.audit()
    assert [(accepted.finding.code, accepted.reason, accepted.by) for accepted in report.accepted] == [
        ("SHELL", "the service's menu", "spec")
    ]
    assert report.counts == {"WRITABLE-PROGRAM": 1}


def test_expired_entry_of_a_baseline_accepts_nothing(tree: Tree) -> None:
    RULES["BASELINE-EXPIRED"][0](tree)
    assert tree.audit().counts == {"SETUID": 1, "BASELINE-EXPIRED": 1}
    RULES["BASELINE-EXPIRED"][1](tree)
    report = tree.audit()
    assert report.counts == {}
    assert [(accepted.reason, accepted.by) for accepted in report.accepted] == [("known", "baseline")]
    assert report.score == 100 > report.score_with_accepted


def test_shell_that_the_spec_gives_an_account_is_no_finding(tree: Tree) -> None:
    account = "ann:x:1000:0::/nonexistent:/bin/sh\n"
    both(accounts(PLAIN + account), tool("/bin/sh", USED))(tree)
    tree.as_jail(accounts=(Account(name="ann", shell="/bin/sh"),))
    assert tree.audit().counts == {}


def test_user_narrows_writers_to_that_user(tree: Tree) -> None:
    tree.write("/etc/of-33", "x", mode=0o644, owner=(33, 0))
    tree.write("/etc/of-34", "x", mode=0o644, owner=(34, 0))
    tree.user = 33
    assert found(tree.audit(), "WRITABLE-FILE") == ["/etc/of-33"]


def test_more_findings_than_are_listed_are_counted(tree: Tree) -> None:
    for number in range(520):
        tree.link(f"/links/{number}", "nothing")
    report = tree.audit()
    assert report.counts == {"LINK-DANGLING": 520}
    assert len(report.findings) == 500


def test_score_falls_with_severity_and_with_number(tree: Tree) -> None:
    scores = [tree.audit().score]
    for change in (link("/etc/x", "nothing"), SETUID_FILE, file("/usr/bin/y", mode=0o4555),
                   node("/dev/sda", stat.S_IFBLK, 8, 0)):  # fmt: skip
        change(tree)
        scores.append(tree.audit().score)
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    report = tree.audit()
    assert report.score == round(100 / (1 + report.points / report.half), 1)


def test_volume_that_nothing_here_can_limit_is_told_and_no_finding(tree: Tree) -> None:
    RULES["LIMIT-VOLUME"][0](tree)
    subject = replace(tree.subject(), unlimited="no means")
    report = audit.audit(subject)
    assert "LIMIT-VOLUME" not in report.counts
    assert [note.reason for note in report.unchecked if note.code == "LIMIT-VOLUME"] == ["no means"]
