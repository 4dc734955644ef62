from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest
from child import in_child

from stockade.kernel import mount as mounting
from stockade.kernel.libc import check, path_argument
from stockade.kernel.namespaces import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    loopback_up,
    refusal,
    sethostname,
    setns,
    unshare,
)
from stockade.kernel.pidfd import has_ended, pid_of, pidfd_open


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting takes root: run the tests as root")


def private() -> None:
    unshare(CLONE_NEWNS)
    mounting.mount(None, "/", None, mounting.MS_REC | mounting.MS_PRIVATE)


def test_mount_and_umount_change_only_the_own_namespace(as_root: None, tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()

    def work() -> list[bool]:
        private()
        mounting.mount("t", os.fspath(tmp_path), "tmpfs", mounting.MS_NODEV, "size=1m")
        mounted = os.path.ismount(tmp_path)
        mounting.umount2(os.fspath(tmp_path), mounting.MNT_DETACH)
        return [mounted, os.path.ismount(tmp_path)]

    assert in_child(work) == [True, False]
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_refused_mount_names_the_call_the_errno_and_the_target(as_root: None) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        mounting.mount("t", "/no/such/place", "tmpfs")
    assert str(caught.value) == "[Errno 2] mount: No such file or directory: '/no/such/place'"


def test_pivot_root_stacks_the_old_root_which_can_be_detached(as_root: None, tmp_path: Path) -> None:
    def work() -> list[str]:
        private()
        mounting.mount("t", os.fspath(tmp_path), "tmpfs")
        (tmp_path / "only").touch()
        os.chdir(tmp_path)
        mounting.pivot_root(".", ".")
        mounting.umount2(".", mounting.MNT_DETACH)
        os.chdir("/")
        return os.listdir("/")

    assert in_child(work) == ["only"]


def test_detached_tree_is_attached_read_only(as_root: None, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").touch()

    def work() -> list[object]:
        private()
        flags = mounting.OPEN_TREE_CLONE | mounting.AT_RECURSIVE
        tree = mounting.open_tree(None, os.fspath(source), flags)
        mounting.mount_setattr(
            tree, "", mounting.AT_EMPTY_PATH | mounting.AT_RECURSIVE, attr_set=mounting.MOUNT_ATTR_RDONLY
        )  # fmt: skip
        mounting.move_mount(tree, os.fspath(target))
        inheritable = os.get_inheritable(tree)
        try:
            (target / "new").touch()
        except OSError as error:
            return [os.listdir(target), error.errno, inheritable]
        return ["was writable"]

    assert in_child(work) == [["file"], errno.EROFS, False]


def test_a_path_with_a_nul_is_refused_instead_of_cut_off() -> None:
    with pytest.raises(ValueError, match="embedded null byte"):
        path_argument("/etc/passwd\0.txt")
    assert path_argument(os.fsdecode(b"/\xff")) == b"/\xff"
    assert path_argument(None) is None


def test_check_passes_success_on() -> None:
    assert check(3, "open") == 3


def test_hostname_is_set_in_a_namespace_of_its_own(as_root: None) -> None:
    before = os.uname().nodename

    def work() -> str:
        unshare(CLONE_NEWUTS)
        sethostname("elsewhere")
        return os.uname().nodename

    assert in_child(work) == "elsewhere"
    assert os.uname().nodename == before


def test_loopback_of_a_new_network_namespace_is_up_only_when_told(as_root: None) -> None:
    def reachable() -> bool:
        with socket.create_server(("127.0.0.1", 0)) as server:
            try:
                socket.create_connection(server.getsockname(), timeout=1).close()
            except OSError:
                return False
        return True

    def work() -> list[bool]:
        unshare(CLONE_NEWNET)
        before = reachable()
        loopback_up()
        return [before, reachable()]

    assert in_child(work) == [False, True]


def test_setns_joins_the_namespace_of_the_kind_that_is_meant(as_root: None) -> None:
    ours = os.readlink("/proc/self/ns/uts")

    def work() -> list[object]:
        descriptor = os.open("/proc/self/ns/uts", os.O_RDONLY)
        unshare(CLONE_NEWUTS)
        changed = os.readlink("/proc/self/ns/uts") != ours
        try:
            setns(descriptor, CLONE_NEWNET)
        except OSError as error:
            wrong = error.errno
        setns(descriptor, CLONE_NEWUTS)
        return [changed, wrong, os.readlink("/proc/self/ns/uts")]

    assert in_child(work) == [True, errno.EINVAL, ours]


def test_a_refused_namespace_is_explained_by_the_sysctl_that_forbids_it(tmp_path: Path, as_root: None) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user/max_user_namespaces").write_text("0\n")

    def work() -> list[str]:
        os.setresuid(65534, 65534, 65534)
        return [refusal(errno.ENOSPC, proc_sys=tmp_path), refusal(errno.EPERM, proc_sys=tmp_path / "none")]

    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    assert in_child(work) == [
        "as root: `sysctl -w user.max_user_namespaces=15000`",
        "a container or a security module around this process forbids it; run outside of it, or as root",
    ]


def test_a_pidfd_tells_id_and_end_of_its_process(as_root: None) -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    descriptor = pidfd_open(pid)
    try:
        assert pid_of(descriptor) == pid
        assert not has_ended(descriptor, 0.05)
        os.kill(pid, 9)
        assert has_ended(descriptor, 5)
        os.waitpid(pid, 0)
        with pytest.raises(ProcessLookupError):
            pid_of(descriptor)
    finally:
        os.close(descriptor)


def test_a_process_that_has_ended_is_not_there_even_while_its_session_goes_on() -> None:
    def work() -> str:
        reader, writer = os.pipe()
        leader = os.fork()
        if leader == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.waitpid(leader, 0)
        try:
            os.close(pidfd_open(leader))
        except ProcessLookupError:
            return "gone"
        finally:
            os.close(writer)
        return "there"

    assert in_child(work) == "gone"


def test_a_pidfd_tells_the_id_that_the_reader_sees_not_the_one_inside(as_root: None) -> None:
    def work() -> list[int]:
        unshare(CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        descriptor = pidfd_open(pid)
        found = [pid_of(descriptor) == pid, pid > 1]
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        return [int(value) for value in found]

    assert in_child(work) == [1, 1]
