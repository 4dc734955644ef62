"""kill -9 of Stockade at each step of what it does to guests and images: all is as before or as after, never between.

A step is a change that it is about to make: a file opened to be written, a write, a name made, moved or removed, a
program started.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import NewGuest
from machine import leftovers, until

from stockade import machines, places
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.vm import control, cow, images, incident, manage, snapshots, sparse, staging, store
from stockade.vm.start import Started, stop

Start = Callable[[str], Started]
Action = Callable[[], object]
_EVENTS = {
    "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod", "os.chown", "os.utime",
    "os.symlink", "subprocess.Popen", "socket.connect",
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_DEADLINE_S = 60.0
_STEPS_MOST = 400


def _carry_out(action: Action, last: int) -> None:
    """In a child: do it, and be killed at step `last`."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
            step()

    write = os.pwrite

    def counted(*arguments: object) -> int:
        step()
        return write(*arguments)  # type: ignore[arg-type]

    os.pwrite = counted  # type: ignore[assignment]
    sys.addaudithook(hook)
    try:
        action()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def killed_at(action: Action, step: int) -> bool:
    """Do it in a process of its own that is killed at that step; False when it was done before."""
    pid = os.fork()
    if pid == 0:
        _carry_out(action, step)
    end = time.monotonic() + _DEADLINE_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL), "it failed"
            return code != 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"it did not end within {_DEADLINE_S:g} s")


def each_step(action: Action, *, least: int, before: Action = lambda: None, after: Callable[[bool], object]) -> None:
    """Kill it at its first step, its second, … until it ends by itself. `after` is told whether it was killed."""
    for step in range(1, _STEPS_MOST):
        before()
        killed = killed_at(action, step)
        # Whatever is half made is no obstacle to whoever lists what there is.
        assert all(images.load(name) for name in images.names())
        assert all(manage.state(name) for name in store.names())
        after(killed)
        if not killed:
            assert step > least, f"it has {step - 1} steps"
            return
    raise AssertionError(f"more than {_STEPS_MOST} steps")


@pytest.fixture(autouse=True)
def nothing_is_left(home: Path) -> Iterator[None]:
    """After each test: no half-made file, no lock."""
    yield
    # A program that was started before its starter was killed may still run for a moment.
    assert until(lambda: leftovers() == []), leftovers()


@pytest.fixture
def kept(running: Guest) -> Guest:
    """A stopped guest with the snapshot "one" and a newer disk."""
    write(running.name, "old")
    snapshots.create(running.name, "one", good=True)
    write(running.name, "new")
    stop(running.name)
    return running


def write(name: str, text: str) -> None:
    status, _, errors = control.execute(name, ["sh", "-c", f"echo {text} > /root/state; sync"], timeout_s=20)
    assert status == 0, errors


def is_free(name: str) -> bool:
    """Whether nobody has the guest's lock."""
    try:
        with store.locked(name):
            return True
    except StateError:
        return False


def contents(name: str) -> str:
    """What the guest, which is started for that, has on its disk."""
    machines.start_guest(name).close()
    status, output, _ = control.execute(name, ["sh", "-c", "cat /root/state 2>/dev/null"], timeout_s=20)
    stop(name, kill=True)
    return output.decode().strip() if status == 0 else "none"


def test_snapshot_create(kept: Guest) -> None:
    disk = sparse.digest(store.disk(kept.name))

    def after(killed: bool) -> None:
        assert sparse.digest(store.disk(kept.name)) == disk
        assert set(snapshots.names(kept.name)) <= {"one", "two"}
        for name in snapshots.names(kept.name):
            snapshots.checked(kept.name, snapshots.load(kept.name, name))
        assert killed or "two" in snapshots.names(kept.name)
        if "two" in snapshots.names(kept.name):
            snapshots.remove(kept.name, "two")

    each_step(lambda: snapshots.create(kept.name, "two"), least=6, after=after)


def test_snapshot_remove(kept: Guest) -> None:
    def before() -> None:
        if "two" not in snapshots.names(kept.name):
            snapshots.create(kept.name, "two")

    def after(killed: bool) -> None:
        for name in snapshots.names(kept.name):
            snapshots.checked(kept.name, snapshots.load(kept.name, name))
        assert killed or snapshots.names(kept.name) == ["one"]

    each_step(lambda: snapshots.remove(kept.name, "two"), least=2, before=before, after=after)


def test_snapshot_restore(kept: Guest) -> None:
    new = store.machine(kept.name).parent / "new.cow"
    shutil.copy(store.disk(kept.name), new)
    digests = {"new": sparse.digest(new), "old": snapshots.load(kept.name, "one").digest}

    def before() -> None:
        with store.locked(kept.name):
            store.replace_disk(store.machine(kept.name), new, kept.uid, kept.gid)

    def after(killed: bool) -> None:
        assert sparse.digest(store.disk(kept.name)) in (digests.values() if killed else [digests["old"]])
        assert store.disk(kept.name).stat().st_uid == kept.uid
        snapshots.checked(kept.name, snapshots.load(kept.name, "one"))
        with store.locked(kept.name):
            assert sorted(path.name for path in store.machine(kept.name).iterdir()) == ["base", "disk.cow", "run"]

    each_step(lambda: snapshots.restore(kept.name, "one"), least=4, before=before, after=after)
    assert contents(kept.name) == "old"


@pytest.mark.slow
def test_guest_restore_of_a_running_guest(kept: Guest) -> None:
    def before() -> None:
        if not control.is_running(kept.name):
            machines.start_guest(kept.name).close()
        write(kept.name, "new")

    def after(killed: bool) -> None:
        # Its end may have been asked for, and takes a moment; a guest that was not asked goes on.
        snapshots.checked(kept.name, snapshots.load(kept.name, "one"))
        if not killed:
            assert contents(kept.name) == "old"
            return
        ending = until(lambda: not control.is_running(kept.name), seconds=0.3)
        assert not ending or until(lambda: is_free(kept.name))
        if control.is_running(kept.name):
            status, output, _ = control.execute(kept.name, ["cat", "/root/state"], timeout_s=20)
            assert (status, output) == (0, b"new\n")
        else:
            assert contents(kept.name) in ("old", "new")

    each_step(lambda: incident.restore(kept.name, "one"), least=5, before=before, after=after)


def test_guest_restore_to_the_clean_image(kept: Guest) -> None:
    def before() -> None:
        snapshots.restore(kept.name, "one")

    def after(killed: bool) -> None:
        cow.check(store.disk(kept.name), store.machine(kept.name) / "base")
        written = cow.written(store.disk(kept.name))
        assert written == 0 if not killed else True
        assert written == 0 or sparse.digest(store.disk(kept.name)) == snapshots.load(kept.name, "one").digest
        with store.locked(kept.name):
            assert sorted(path.name for path in store.machine(kept.name).iterdir()) == ["base", "disk.cow", "run"]

    each_step(lambda: incident.restore(kept.name), least=3, before=before, after=after)
    assert contents(kept.name) == "none"


@pytest.mark.parametrize("source", ["the disk", "a snapshot"])
def test_guest_clone(kept: Guest, source: str) -> None:
    snapshot, wanted = ("one", "old") if source == "a snapshot" else ("", "new")
    disk = sparse.digest(store.disk(kept.name))

    def after(killed: bool) -> None:
        assert sparse.digest(store.disk(kept.name)) == disk
        assert killed or "copy" in store.names()
        if "copy" in store.names():
            cow.check(store.disk("copy"), store.machine("copy") / "base")
            assert killed or contents("copy") == wanted
            machines.discard("copy")

    each_step(lambda: snapshots.clone(kept.name, "copy", snapshot=snapshot), least=10, after=after)


@pytest.mark.slow
def test_guest_clone_of_a_running_guest_lets_it_go_on(running: Guest) -> None:
    write(running.name, "here")

    def after(killed: bool) -> None:
        assert until(lambda: not control.request(running.name, "status")["frozen"])
        assert control.execute(running.name, ["cat", "/root/state"], timeout_s=20)[1] == b"here\n"
        for name in [name for name in store.names() if name.startswith("study")]:
            assert killed or contents(name) == "here"
            machines.discard(name)

    each_step(lambda: list(incident.clones(running.name, 2, prefix="study")), least=20, after=after)
    list(incident.clones(running.name, 0))  # what the last one left


@pytest.mark.slow
def test_image_create(home: Path, tmp_path: Path) -> None:
    small_tree = tmp_path / "root"
    (small_tree / "bin").mkdir(parents=True)
    (small_tree / "bin/file").write_bytes(os.urandom(100_000))
    (small_tree / "link").symlink_to("bin/file")
    record = Image(name="made", sha256="", size=0, mtime=0, origin="directory")

    def after(killed: bool) -> None:
        assert killed or "made" in images.names()
        if "made" in images.names():
            assert images.verify("made")
            images.remove("made", [])

    each_step(lambda: staging.image_of("made", small_tree, record), least=6, after=after)
    staging.image_of("made", small_tree, record)
    images.remove("made", [])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_image_export_and_import(image: Image, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"image{suffix}"
    digest = images.export("small", tmp_path / f"whole{suffix}")

    def exported(killed: bool) -> None:
        assert set(os.listdir(tmp_path)) <= {f"whole{suffix}", target.name}
        if target.exists():
            assert sparse.file_sha256(target) == digest
            target.unlink()
        else:
            assert killed

    each_step(lambda: images.export("small", target), least=1, after=exported)

    def imported(killed: bool) -> None:
        assert killed or "taken" in images.names()
        if "taken" in images.names():
            assert images.load("taken").sha256 == image.sha256
            assert images.verify("taken")
            images.remove("taken", [])

    source = tmp_path / f"whole{suffix}"
    each_step(lambda: images.add_file("taken", source, sha256=digest), least=6, after=imported)
    images.add_file("taken", source, sha256=digest)
    images.remove("taken", [])


@pytest.mark.slow
def test_snapshot_export_and_import(kept: Guest, tmp_path: Path) -> None:
    target = tmp_path / "one.tar.zst"
    snapshots.export(kept.name, "one", tmp_path / "whole.tar.zst")

    def exported(killed: bool) -> None:
        assert set(os.listdir(tmp_path)) <= {"whole.tar.zst", "one.tar.zst"}
        if target.exists():
            snapshots.import_(target, "elsewhere")
            machines.discard("elsewhere")
            target.unlink()
        else:
            assert killed

    each_step(lambda: snapshots.export(kept.name, "one", target), least=1, after=exported)

    def imported(killed: bool) -> None:
        assert killed or snapshots.names("elsewhere") == ["one"]
        if "elsewhere" in store.names():
            for name in snapshots.names("elsewhere"):
                snapshots.checked("elsewhere", snapshots.load("elsewhere", name))
            assert killed or contents("elsewhere") == "old"
            machines.discard("elsewhere")

    each_step(lambda: snapshots.import_(tmp_path / "whole.tar.zst", "elsewhere"), least=12, after=imported)
    snapshots.import_(tmp_path / "whole.tar.zst", "elsewhere")
    machines.discard("elsewhere")


def test_guest_flatten_and_rm(kept: Guest, new_guest: NewGuest) -> None:
    def flattened(killed: bool) -> None:
        assert killed or "flat" in images.names()
        if "flat" in images.names():
            assert images.verify("flat")
            images.remove("flat", [])

    each_step(lambda: manage.flatten(kept.name, "flat"), least=8, after=flattened)
    manage.flatten(kept.name, "flat")
    images.remove("flat", [])

    def before() -> None:
        if "doomed" not in store.names():
            new_guest(name="doomed")

    def removed(killed: bool) -> None:
        assert killed or "doomed" not in store.names()
        if "doomed" in store.names():
            cow.check(store.disk("doomed"), store.machine("doomed") / "base")

    each_step(lambda: store.remove("doomed"), least=3, before=before, after=removed)
    assert not places.guest("doomed").exists()
