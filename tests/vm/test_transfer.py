"""Files go into a guest and come out of it unchanged, quickly, and never land where nobody asked for them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine import MEMORY, make_tree, needs_uml, shell, until

from stockade import machines
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.vm import control, staging, store, transfer
from stockade.vm.start import Started, stop

Start = Callable[[str], Started]
BIG = 160 << 20


@pytest.fixture(scope="module")
def roomy(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image with room for large files."""
    needs_uml()
    record = Image(name="roomy", sha256="", size=0, mtime=0, origin="directory", source="busybox")
    return staging.image_of("roomy", make_tree(tmp_path_factory.mktemp("roomy") / "root"), record, size=2 * BIG)


@pytest.fixture(scope="module", params=["vm", "jail,vm"])
def files(request: pytest.FixtureRequest, roomy: Image) -> Iterator[str]:
    """A guest with room that runs, behind each set of walls."""
    name = f"files{request.param.count(',')}"
    store.create(name, roomy, memory=2 * MEMORY, walls=tuple(request.param.split(",")))
    machines.start_guest(name).close()
    yield name
    machines.discard(name)


def disks(name: str) -> str:
    return shell(name, "ls /dev/ | grep ubd || true").strip()


def kept(name: str) -> list[str]:
    """Files of copies that UML's directory still has."""
    return [entry for entry in os.listdir(store.machine(name) / "run") if entry.startswith("copy-")]


def test_large_file_goes_in_and_comes_out_the_same(files: str, tmp_path: Path) -> None:
    piece = os.urandom(1 << 20)
    with open(tmp_path / "big", "wb") as file:
        for number in range(BIG >> 20):
            file.write(number.to_bytes(8, "big") + piece[8:])
    assert transfer.push(files, tmp_path / "big", "/root/big") == 1
    digest = subprocess.run(["sha256sum", tmp_path / "big"], capture_output=True, text=True, timeout=60, check=True)
    assert shell(files, "sha256sum /root/big", timeout_s=120).split()[0] == digest.stdout.split()[0]
    assert transfer.pull(files, "/root/big", tmp_path / "back") == 1
    subprocess.run(["cmp", tmp_path / "big", tmp_path / "back"], timeout=60, check=True)
    shell(files, "rm /root/big; sync")
    assert (until(lambda: disks(files) == "ubda"), kept(files)) == (True, [])


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8000, 8200, 100_000, 262_144, 300_001, 1 << 20])
def test_file_of_any_size_is_the_same_there_and_back(files: str, tmp_path: Path, size: int) -> None:
    (tmp_path / "one").write_bytes(os.urandom(size))
    transfer.push(files, tmp_path / "one", "/root/one")
    assert int(shell(files, "wc -c < /root/one")) == size
    transfer.pull(files, "/root/one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Every name below a directory with its type, mode and contents."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        contents = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = None if path.is_symlink() else status.st_mode
        found[str(path.relative_to(root))] = (mode, contents)
    return found


@pytest.mark.parametrize("size", [10, 500_000], ids=["by the line", "by a disk"])
def test_tree_keeps_names_of_any_bytes_modes_links_and_contents(files: str, tmp_path: Path, size: int) -> None:
    root = tmp_path / "in"
    (root / "deep/er/down").mkdir(parents=True)
    (root / "empty").mkdir()
    names = (b"plain", b"\xff\xfe raw", b"new\nline", b" spaces ", b"-dash", b"deep/er/down/\xe4", b"'\"\\", b"x" * 255)
    for name in names:
        path = root / os.fsdecode(name)
        path.write_bytes(name + os.urandom(size))
        path.chmod(0o640)
    (root / "plain").chmod(0o755)
    (root / "link").symlink_to("/etc/passwd")
    (root / os.fsdecode(b"link\xff")).symlink_to(os.fsdecode(b"\xfe target"))
    (root / "deep/er").chmod(0o711)
    (root / "deep").chmod(0o555)
    os.mkfifo(root / "left out")
    expected = {name: what for name, what in snapshot(root).items() if name != "left out"}
    place = f"/root/tree{size}"
    assert transfer.push(files, root, place) == 8
    assert transfer.push(files, root, place) == 8, "and again over itself"
    assert transfer.pull(files, place, tmp_path / "out") == 8
    assert snapshot(tmp_path / "out") == expected
    assert shell(files, f"stat -c %a '{place}/deep' '{place}/deep/er' '{place}/plain'").split() == ["555", "711", "755"]


def test_setuid_does_not_come_out_nor_go_in(files: str, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"x")
    (tmp_path / "program").chmod(0o4755)
    transfer.push(files, tmp_path / "program", "/root/program")
    assert shell(files, "stat -c '%a %u' /root/program; chmod 6755 /root/program").split() == ["755", "0"]
    transfer.pull(files, "/root/program", tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o755


def test_holes_stay_holes_in_both_directions(files: str, tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(3 << 30)
        os.pwrite(file.fileno(), b"middle", 1 << 30)
        os.pwrite(file.fileno(), b"late", (3 << 30) - (1 << 20))
    began = time.monotonic()
    transfer.push(files, tmp_path / "sparse", "/root/sparse")
    assert int(shell(files, "stat -c %b /root/sparse")) < 200
    transfer.pull(files, "/root/sparse", tmp_path / "back")
    assert time.monotonic() - began < 30, "what is not there is not copied"
    status = (tmp_path / "back").stat()
    assert (status.st_size, status.st_blocks < 200) == (3 << 30, True)
    with open(tmp_path / "back", "rb") as file:
        assert os.pread(file.fileno(), 6, 1 << 30) == b"middle"
        assert os.pread(file.fileno(), 4, (3 << 30) - (1 << 20)) == b"late"


def test_what_has_no_size_is_read_to_its_end(files: str, tmp_path: Path) -> None:
    transfer.pull(files, "/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text() == shell(files, "cat /proc/version")


def test_each_refusal_names_the_path_and_leaves_nothing(files: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(256)) * 40000)
    refused = {"/missing/name": "no such file", "/etc/passwd/below": "not a directory", "/etc": "directory"}
    for path, words in refused.items():
        for source in ("big", "small"):
            (tmp_path / "small").write_bytes(b"few")
            with pytest.raises(StateError, match=f"{path}.*{words}"):
                transfer.push(files, tmp_path / source, path)
    for path, words in (("/missing", "no such file"), ("/dev/null", "no file and no directory")):
        with pytest.raises(StateError, match=words):
            transfer.pull(files, path, tmp_path / "out")
    with pytest.raises(StateError, match="another version"):
        transfer._command(files, ["@of-another-time", "/"], "/")
    assert not (tmp_path / "out").exists()
    assert until(lambda: disks(files) == "ubda")
    assert kept(files) == []
    assert "stockade-new" not in shell(files, "ls / /root /etc")


def test_disk_of_the_guest_that_is_full_is_an_error_and_the_file_before_stays(files: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    transfer.push(files, tmp_path / "old", "/root/kept")
    with open(tmp_path / "huge", "wb") as file:
        for _ in range((2 * BIG >> 20) + 64):
            file.write(os.urandom(1024) * 1024)
    with pytest.raises(StateError, match=r"/root/kept.*no space left"):
        transfer.push(files, tmp_path / "huge", "/root/kept")
    assert shell(files, "cat /root/kept") == "old"
    assert shell(files, "ls /root | grep -c new || true").strip() == "0"
    assert (until(lambda: disks(files) == "ubda"), kept(files)) == (True, [])


def test_copy_out_that_the_host_has_no_room_for_is_refused_before_it_begins(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(files, "head -c 3000000 /dev/urandom > /root/some")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(StateError, match="needs more room than there is: 1 MB"):
        transfer.pull(files, "/root/some", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_copies_at_once_do_not_meet(files: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stockade.vm import transfer\n"
        "guest, source, place, back = sys.argv[1:]\n"
        "transfer.push(guest, Path(source), place); transfer.pull(guest, place, Path(back))\n"
        "assert Path(source).read_bytes() == Path(back).read_bytes()\n"
    )
    children = []
    for number in range(4):
        source = tmp_path / f"in{number}"
        source.write_bytes(os.urandom(3 << 20))
        children.append(subprocess.Popen(
            [sys.executable, "-c", code, files, source, f"/root/at-once-{number}", tmp_path / f"out{number}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    for child in children:
        assert (child.wait(120), child.stderr.read() if child.stderr else "") == (0, "")
        assert child.stderr is not None
        child.stderr.close()
    assert (until(lambda: disks(files) == "ubda"), kept(files)) == (True, [])


_STUCK = """
import sys, time
from pathlib import Path
from stockade.vm import control, transfer
original = transfer._command
def command(guest, argv, path, **more):
    if argv[0] == sys.argv[3]:
        print("attached", flush=True)
        time.sleep(60)
    return original(guest, argv, path, **more)
transfer._command = command
if sys.argv[3] == "@unpack":
    transfer.push(sys.argv[1], Path(sys.argv[2]), "/root/half")
else:
    transfer.pull(sys.argv[1], "/root/whole", Path(sys.argv[2] + ".out"))
"""


@pytest.mark.parametrize("step", ["@unpack", "@pack"])
def test_killing_stockade_in_the_middle_of_a_copy_takes_the_disk_from_the_guest_again(
    running: Guest, start: Start, tmp_path: Path, step: str
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    transfer.push(running.name, tmp_path / "file", "/root/whole")
    child = subprocess.Popen(
        [sys.executable, "-c", _STUCK, running.name, tmp_path / "file", step], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "attached\n"
    assert "ubdb" in control.execute(running.name, ["ls", "/dev"])[1].decode()
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    assert until(lambda: b"ubdb" not in control.execute(running.name, ["ls", "/dev"])[1])
    assert control.execute(running.name, ["ls", "/root"])[1] == b"whole\n"
    transfer.pull(running.name, "/root/whole", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    stop(running.name, kill=True)
    start(running.name)
    assert kept(running.name) == [], "what was left is gone with the next start"


def test_disk_that_is_still_open_in_the_guest_is_taken_away_once_it_is_closed(running: Guest) -> None:
    with transfer._file(running.name) as (file, name):
        os.ftruncate(file, 1 << 20)
        with transfer._disk(running.name, name) as device:
            session = control.Session(running.name, ["sh", "-c", f"exec 3< {device}; echo open; read line"])
            assert session.read(20)
    with session:
        for _ in range(5):
            assert b"ubdb" in control.execute(running.name, ["ls", "/dev"])[1]
        session.end_input()
        assert until(lambda: b"ubdb" not in control.execute(running.name, ["ls", "/dev"])[1])
