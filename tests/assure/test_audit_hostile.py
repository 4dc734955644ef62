"""Trees that are made to mislead, to hang or to leak: findings, and never a way out."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit_trees import Tree, found

from stockade.assure import audit
from stockade.assure.audit import catalogue, dpkg, secrets
from stockade.assure.audit.libraries import Beneath
from stockade.assure.audit.seen import Seen
from stockade.assure.audit.tree import Node, open_regular, walk
from stockade.errors import NotFoundError, UsageError
from stockade.kernel.beneath import Root

SOURCE = Path(__file__).resolve().parents[2] / "src"

COUNTS = """
import json, sys
from pathlib import Path
from stockade.assure import audit
report = audit.audit(audit.of_directory(Path(sys.argv[1])))
print(json.dumps({"counts": report.counts, "paths": [finding.path for finding in report.findings]}))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files other owners and make device nodes")
    return Tree.new(tmp_path)


def nodes(root: Path) -> Iterator[Node]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for seen in walk(descriptor, {}):
            if isinstance(seen, Node):
                yield seen
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["fifo", "device", "symlink", "nothing"])
def test_file_that_is_replaced_after_the_look_is_never_opened(tree: Tree, kind: str) -> None:
    place = tree.write("/etc/x", "x")
    for node in nodes(tree.root):
        if node.path != "/etc/x":
            continue
        place.unlink()
        if kind == "fifo":
            os.mkfifo(place)
        elif kind == "device":
            os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))
        elif kind == "symlink":
            place.symlink_to("/etc/shadow")
        result = open_regular(node)
        assert isinstance(result, Seen)
        assert result.code == "VANISHED"


def test_directory_that_is_replaced_by_a_link_is_not_entered(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    tree.directory("/d")
    descriptor = os.open(tree.root, os.O_RDONLY | os.O_DIRECTORY)
    seen = []
    for entry in walk(descriptor, {}):
        seen.append(entry)
        if isinstance(entry, Node) and entry.path == "/d":
            tree.path("/d").rmdir()
            tree.link("/d", str(outside))
    os.close(descriptor)
    assert not [entry for entry in seen if entry.path.startswith("/d/")]
    assert [entry.code for entry in seen if isinstance(entry, Seen)] in (["VANISHED"], ["UNREADABLE"])


def test_file_that_vanishes_is_a_finding(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tree.write("/etc/x", "x")

    def remove(node: Node, subject: audit.Subject) -> Iterator[Seen]:
        if node.path == "/etc/x":
            place.unlink()
        return iter(())

    monkeypatch.setattr(audit, "program", remove)
    assert found(tree.audit(), "VANISHED") == ["/etc/x"]


def test_accounts_behind_a_link_out_of_the_tree_are_not_read(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("evil:x:0:0::/:/bin/sh\nevil2:x:0:0::/:/bin/sh\n")
    for name in ("passwd", "group", "shadow"):
        tree.path(f"/etc/{name}").unlink()
    tree.path("/etc").rmdir()
    tree.link("/etc", "../outside")
    assert tree.path("/etc/passwd").exists()
    report = tree.audit()
    assert "UID0-DOUBLE" not in report.counts
    assert found(report, "LINK-DANGLING") == found(report, "LINK-OUTSIDE") == ["/etc"]


def test_library_behind_a_link_out_of_the_tree_does_not_count(tree: Tree) -> None:
    tree.program("ls")
    library = next(tree.path("/usr/lib").rglob("libselinux.so.1"))
    real = f"/{library.relative_to(tree.root)}"
    assert Path(real).exists()
    library.unlink()
    depth = len(library.parts)
    library.symlink_to("../" * depth + real.lstrip("/"))
    assert "/usr/bin/ls" in found(tree.audit(), "ELF-BROKEN")


def test_program_that_lacks_a_library_is_what_the_dynamic_linker_says_too(tree: Tree) -> None:
    program = tree.program("ls")
    run = ["chroot", str(tree.root), program, "/"]
    assert subprocess.run(run, capture_output=True, timeout=20, check=False).returncode == 0
    assert "ELF-BROKEN" not in tree.audit().counts
    next(tree.path("/usr/lib").rglob("libselinux.so.1")).unlink()
    done = subprocess.run(run, capture_output=True, timeout=20, check=False)
    assert b"libselinux.so.1: cannot open shared object file" in done.stderr
    [broken] = [finding for finding in tree.audit().findings if finding.code == "ELF-BROKEN"]
    assert (broken.path, "`libselinux.so.1`" in broken.message) == (program, True)


def test_names_of_any_bytes_are_reported_and_do_not_reach_the_terminal(tree: Tree) -> None:
    name = b"\xff\xfe\x1b[31m\nevil"
    place = os.fsencode(tree.root) + b"/etc/" + name
    descriptor = os.open(place, os.O_CREAT | os.O_WRONLY, 0o4755)
    os.close(descriptor)
    os.chmod(place, 0o4755)
    command = [sys.executable, "-m", "stockade", "audit", "--root", str(tree.root)]
    environment = {"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"\\xff\\xfe\\x1b[31m\\nevil" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    report = json.loads(subprocess.run([*command, "--json"], env=environment, capture_output=True, timeout=60).stdout)
    assert report["counts"]["SETUID"] == 1


def test_directory_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to audit as somebody with fewer rights")
    os.chmod(tmp_path, 0o755)
    for above in tmp_path.parents[:2]:
        os.chmod(above, 0o755)
    tree = Tree.new(tmp_path)
    tree.directory("/closed", mode=0o700)
    tree.write("/etc/closed", "x", mode=0o400)
    done = subprocess.run(
        [sys.executable, "-c", COUNTS, str(tree.root)], env={"PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"},
        user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["counts"]["UNREADABLE"] == 3  # the third is the plain tree's /etc/shadow


@pytest.mark.parametrize(
    ("mount", "code"),
    [("proc", "MOUNTED-PROC"), ("sysfs", "MOUNTED-SYSTEM"), ("tmpfs", "MOUNTED"), ("--bind /etc", "MOUNTED")],
)
def test_what_is_mounted_inside_is_a_finding_and_is_not_entered(tree: Tree, mount: str, code: str) -> None:
    place = tree.directory("/a b")
    how = f"mount {mount}" if mount.startswith("--") else f"mount -t {mount} {mount}"
    script = f'{how} "$1" && exec "$2" -c "$3" "$4"'
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(place), sys.executable, COUNTS,
         str(tree.root)],
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin:/usr/sbin"}, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["counts"] == {code: 1}
    assert report["paths"] == ["/a b"]
    assert code not in tree.audit().counts


def test_memory_does_not_grow_with_the_number_of_files(tree: Tree) -> None:
    def peak(count: int) -> int:
        directory = tree.directory(f"/many-{count}")
        for number in range(count):
            (directory / f"a file with a longer name, number {number}").write_text("x")
        tracemalloc.start()
        assert tree.audit().counts == {}
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10)
    few, many = peak(200), peak(4000)
    assert many - few < 200_000, "50 bytes for each file more than that would be a list of them"


@pytest.mark.parametrize("entry", range(len(catalogue.lists()["secrets"]["contents"])))
def test_hostile_text_takes_linear_time(entry: int) -> None:
    texts = catalogue.lists()["secrets"]["contents"][entry]["texts"]
    size = secrets.limit()
    began = time.process_time()
    for text in (*texts, f"-----BEGIN {texts[0]}-----\n", "://a:", "A: ", "A: \n"):
        for filling in ("", " ", "\n", "a", "A", ":", "=", "0", "_", "-", "."):
            for pattern in (text + filling, text + filling * 50, text + filling * 5000):
                data = (texts[0] + pattern * (size // len(pattern)))[: size // 16].encode()
                list(secrets.secrets("/x", data))
    assert time.process_time() - began < 4


def test_hostile_files_with_telling_names_take_linear_time() -> None:
    names = ["/.pgpass", "/.netrc", "/.git-credentials", "/.npmrc", "/.htpasswd", "/etc/ppp/chap-secrets",
             "/.kube/config", "/.docker/config.json", "/.my.cnf"]  # fmt: skip
    pieces = (":", "a:", "://a:", "password ", "password=\n", '"auth" : "a', "_auth=\n", "\n", " ", "\t\n", "token: ")
    began = time.process_time()
    for name in names:
        for piece in pieces:
            list(secrets.secrets(name, (piece * secrets.limit())[: secrets.limit() // 8].encode()))
    assert time.process_time() - began < 4


def test_random_bytes_that_claim_to_be_elf_never_stop_an_audit(tree: Tree) -> None:
    chance = random.Random(1)
    original = Path("/bin/true").read_bytes()
    for number in range(150):
        data = bytearray(original)
        for _ in range(chance.randrange(1, 30)):
            data[chance.randrange(16, 4096)] = chance.randrange(256)
        tree.write(f"/usr/bin/t{number}", bytes(data[: chance.choice((64, 200, 4096, len(data)))]), mode=0o555)
    report = tree.audit()
    assert report.counts.keys() <= {"ELF-DAMAGED", "ELF-BROKEN"}
    assert report.counts["ELF-DAMAGED"] > 10


def test_versions_are_compared_as_dpkg_compares_them() -> None:
    if subprocess.run(["sh", "-c", "command -v dpkg"], capture_output=True, timeout=20, check=False).returncode != 0:
        pytest.skip("needs dpkg to compare with")
    chance = random.Random(2)
    parts = ["1", "01", "10", "2", "~", "~rc1", "+b1", "a", "Z", ".", "-1", "-0", "+", "1:", "0", "deb12u1"]
    pairs = [("1.0~rc1-1", "1.0-1"), ("1:0.9", "2.0"), ("2-9+deb12u10", "2-9+deb12u9"), ("1.0", "1.0-0"), ("1a", "1+")]
    while len(pairs) < 60:
        one, other = ("1" + "".join(chance.choices(parts[:13], k=3)) for _ in range(2))
        pairs.append((one, other))
    for one, other in pairs:
        relation = "lt" if dpkg.compare(one, other) < 0 else "gt" if dpkg.compare(one, other) > 0 else "eq"
        done = subprocess.run(
            ["dpkg", "--compare-versions", one, relation, other], capture_output=True, timeout=20, check=False
        )
        assert done.returncode == 0, (one, relation, other)


def test_what_is_no_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError, match="there is no directory"):
        audit.audit(audit.of_directory(tmp_path / "absent"))
    with pytest.raises(UsageError, match="is no directory"):
        audit.audit(audit.of_directory(tmp_path / "file"))


@pytest.mark.parametrize(
    "text", ["accept = 1", "[[accept]]\ncode = 'SETUID'", "[[accept]]\ncode='A'\nreason=''", "x", "[[accept]]\nwhy='x'"]
)
def test_damaged_baseline_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(UsageError, match="is no baseline"):
        audit.read_baseline(tmp_path / "b.toml")


def test_library_search_does_not_follow_a_directory_that_became_a_link(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "libx.so").write_text("of the host")
    tree.write("/opt/libx.so", "of the tree")
    with Root.open(tree.root) as root:
        host = Beneath(root)
        assert host.walk("/opt/libx.so").is_file
        assert host.data("/opt/libx.so", limit=100) == b"of the tree"
        tree.path("/opt").rename(tree.path("/old"))
        tree.link("/opt", str(outside))
        assert host.data("/opt/libx.so", limit=100) is None
        tree.path("/opt").unlink()
        tree.directory("/opt")
        os.mkfifo(tree.path("/opt/libx.so"))
        assert host.data("/opt/libx.so", limit=100) is None
        host.close()
