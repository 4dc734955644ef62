"""Landlock plans by ABI, and carried out on the running kernel in a forked child."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from child import PR_SET_NO_NEW_PRIVS, in_child, libc

from stockade.kernel import landlock
from stockade.kernel.landlock import Grant, ruleset
from stockade.records.policy import LandlockPlan

ABI = landlock.abi()

needs_landlock = pytest.mark.skipif(
    ABI == 0, reason="this kernel has no Landlock: it needs CONFIG_SECURITY_LANDLOCK and `lsm=landlock,…` at boot"
)

# Rights by ABI, counted from the tables of landlock(7): the highest bit of access_fs that each one knows.
HIGHEST = {1: 12, 2: 13, 3: 14, 4: 14, 5: 15, 6: 15, 7: 15}


@pytest.mark.parametrize("version", range(1, 8))
def test_every_right_of_the_abi_is_handled_and_none_that_it_does_not_know(version: int) -> None:
    plan = ruleset(version, [Grant(path="/", access=("read", "execute", "write", "device"))])
    assert plan is not None
    assert plan.handled_fs == (1 << HIGHEST[version] + 1) - 1
    assert plan.rules[0].access & ~plan.handled_fs == 0
    assert plan.abi == version


@pytest.mark.parametrize(
    ("version", "size", "net", "scoped"),
    [(1, 8, 0, 0), (3, 8, 0, 0), (4, 16, 3, 0), (5, 16, 3, 0), (6, 24, 3, 1), (7, 24, 3, 1)],
)
def test_ports_and_scope_come_with_their_abi(version: int, size: int, net: int, scoped: int) -> None:
    plan = ruleset(version, [], bind=[80], connect=[])
    assert plan is not None
    assert (plan.attribute_size, plan.handled_net, plan.scoped) == (size, net, scoped)
    assert [(rule.port, rule.access) for rule in plan.ports] == ([(80, 1)] if net else [])


def test_an_unknown_later_abi_is_treated_as_the_newest_known() -> None:
    grants = [Grant(path="/", access=("read",))]
    assert ruleset(99, grants) == ruleset(landlock.NEWEST_ABI, grants)


def test_no_landlock_is_no_plan() -> None:
    assert ruleset(0, [Grant(path="/", access=("read",))]) is None


def test_no_grant_lets_a_device_be_made() -> None:
    plan = ruleset(7, [Grant(path="/", access=("read", "execute", "write", "device"))])
    assert plan is not None
    assert plan.rules[0].access & (landlock.MAKE_CHAR | landlock.MAKE_BLOCK) == 0


def test_what_an_abi_leaves_open_is_said() -> None:
    old, new = ruleset(2, []), ruleset(7, [])
    assert old is not None and new is not None
    assert old.lacking == (
        "truncating a file by its path is left to the mounts",
        "TCP ports are left to the network namespace",
        "ioctl on devices is left to the system call filter",
        "abstract Unix sockets are left to the network namespace",
    )
    assert new.lacking == ()


def test_grants_for_one_path_are_joined_and_sorted() -> None:
    plan = ruleset(
        7,
        [
            Grant(path="/b", access=("read",)),
            Grant(path="/a", access=("write",)),
            Grant(path="/b", access=("execute",)),
        ],
    )
    assert plan is not None
    assert [rule.path for rule in plan.rules] == ["/a", "/b"]
    assert plan.rules[1].access == landlock.READ_FILE | landlock.READ_DIR | landlock.EXECUTE


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def carry_out(plan: LandlockPlan) -> None:
    """What the launch does with a plan, by landlock(7)."""
    attribute = struct.pack("=QQQ", plan.handled_fs, plan.handled_net, plan.scoped)[: plan.attribute_size]
    descriptor = checked(libc.syscall(444, attribute, ctypes.c_size_t(len(attribute)), 0))
    for rule in plan.rules:
        parent = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
        beneath = _PathBeneath(rule.access, parent)
        checked(libc.syscall(445, descriptor, 1, ctypes.byref(beneath), 0))
    for port in plan.ports:
        checked(libc.syscall(445, descriptor, 2, struct.pack("=QQ", port.access, port.port), 0))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    checked(libc.syscall(446, descriptor, 0))


def attempt(action: Callable[[], object]) -> str:
    """"0", or the name of the errno with which `action` failed."""
    try:
        action()
    except OSError as failure:
        return errno.errorcode[failure.errno or 0]
    return "0"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("read", "write", "hidden", "fixed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    shutil.copy("/bin/true", tmp_path / "read" / "program")
    return tmp_path


def grants(tree: Path) -> list[Grant]:
    return [
        Grant(path=str(tree / "read"), access=("read",)),
        Grant(path=str(tree / "write"), access=("read", "write")),
        Grant(path=str(tree / "fixed"), access=("read", "truncate")),
        Grant(path="/usr", access=("execute",)),
        Grant(path="/lib64", access=("execute",)),
        Grant(path="/dev/null", access=("device",), directory=False),
    ]


ATTEMPTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "read a readable file": (lambda tree: (tree / "read/file").read_text(), "0"),
    "list a readable directory": (lambda tree: os.listdir(tree / "read"), "0"),
    "read a hidden file": (lambda tree: (tree / "hidden/file").read_text(), "EACCES"),
    "list a hidden directory": (lambda tree: os.listdir(tree / "hidden"), "EACCES"),
    "write a readable file": (lambda tree: (tree / "read/file").write_text("x"), "EACCES"),
    "create in a readable directory": (lambda tree: (tree / "read/new").write_text("x"), "EACCES"),
    "remove from a readable directory": (lambda tree: (tree / "read/file").unlink(), "EACCES"),
    "write a writable file": (lambda tree: (tree / "write/file").write_text("x"), "0"),
    "create in a writable directory": (lambda tree: (tree / "write/new").write_text("x"), "0"),
    "make a directory there": (lambda tree: (tree / "write/directory").mkdir(), "0"),
    "make a pipe there": (lambda tree: os.mkfifo(tree / "write/pipe"), "0"),
    "make a symbolic link there": (lambda tree: (tree / "write/link").symlink_to("file"), "0"),
    "make a device there": (lambda tree: os.mknod(tree / "write/device", 0o020600, os.makedev(1, 3)), "EACCES"),
    "rename within": (lambda tree: (tree / "write/new").rename(tree / "write/directory/new"), "0"),
    "rename out of a readable directory": (lambda tree: (tree / "read/file").rename(tree / "write/stolen"), "EACCES"),
    "link a hidden file": (lambda tree: os.link(tree / "hidden/file", tree / "write/hidden"), "EACCES|EXDEV"),
    "execute where execution is not granted": (lambda tree: os.execv(tree / "read/program", ["program"]), "EACCES"),
    "write a device": (lambda tree: Path("/dev/null").write_bytes(b"x"), "0"),
    "truncate a readable file": (lambda tree: os.truncate(tree / "read/file", 0), "EACCES"),
    "truncate where that is granted": (lambda tree: os.truncate(tree / "fixed/file", 0), "0"),
    "open for writing where only truncating is": (lambda tree: (tree / "fixed/file").write_text("x"), "EACCES"),
    "create where only truncating is granted": (lambda tree: (tree / "fixed/new").touch(), "EACCES"),
    "truncate a hidden file": (lambda tree: os.truncate(tree / "hidden/file", 0), "EACCES"),
}


@needs_landlock
def test_the_kernel_holds_each_grant_and_refuses_the_rest(tree: Path) -> None:
    if ABI < 3:
        pytest.skip(f"ABI {ABI} has neither refer nor truncate: use a kernel from 6.2 on")
    plan = ruleset(ABI, grants(tree))
    assert plan is not None

    def work() -> dict[str, str]:
        carry_out(plan)
        return {name: attempt(lambda action=action: action(tree)) for name, (action, _) in ATTEMPTS.items()}  # type: ignore[misc]

    results = in_child(work)
    wrong = {name for name, (_, expected) in ATTEMPTS.items() if results[name] not in expected.split("|")}
    assert wrong == set(), results


@needs_landlock
@pytest.mark.parametrize("name", [name for name, (_, expected) in ATTEMPTS.items() if expected != "0"])
def test_what_the_plan_refuses_is_possible_without_it(tree: Path, name: str) -> None:
    action, _ = ATTEMPTS[name]
    if "execute" in name:
        assert os.access(tree / "read/program", os.X_OK)
    elif "device" in name and os.geteuid() != 0:
        pytest.skip("making a device needs root")
    else:
        assert in_child(lambda: attempt(lambda: action(tree))) == "0"


@needs_landlock
@pytest.mark.parametrize("version", range(1, 8))
def test_the_kernel_takes_the_plan_of_every_abi_that_it_has(tree: Path, version: int) -> None:
    if version > ABI:
        pytest.skip(f"this kernel's ABI is {ABI}")
    plan = ruleset(version, grants(tree), bind=[1], connect=[2])
    assert plan is not None

    def work() -> list[str]:
        carry_out(plan)
        return [attempt(lambda: (tree / "hidden/file").read_text()), attempt(lambda: (tree / "read/file").read_text())]

    assert in_child(work) == ["EACCES", "0"]


@needs_landlock
def test_only_the_listed_ports_can_be_bound_and_connected_to() -> None:
    if ABI < 4:
        pytest.skip(f"ABI {ABI} has no TCP rules: use a kernel from 6.7 on")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        def work(allowed: list[int]) -> list[str]:
            plan = ruleset(ABI, [Grant(path="/", access=("read",))], bind=[0], connect=allowed)
            assert plan is not None
            carry_out(plan)
            with socket.socket() as client, socket.socket() as chosen, socket.socket() as fixed:
                return [
                    attempt(lambda: client.connect(("127.0.0.1", port))),
                    attempt(lambda: chosen.bind(("127.0.0.1", 0))),
                    attempt(lambda: fixed.bind(("127.0.0.1", 1))),
                ]

        assert in_child(lambda: work([port])) == ["0", "0", "EACCES"]
        assert in_child(lambda: work([])) == ["EACCES", "0", "EACCES"]


@needs_landlock
def test_an_abstract_socket_outside_is_out_of_reach_and_signals_are_not_scoped() -> None:
    if ABI < 6:
        pytest.skip(f"ABI {ABI} has no scopes: use a kernel from 6.12 on")
    name = f"\0stockade-test-{os.getpid()}"
    plan = ruleset(ABI, [Grant(path="/", access=("read",))])
    assert plan is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        parent = os.getpid()

        def work(*, walled: bool) -> list[str]:
            if walled:
                carry_out(plan)
            with socket.socket(socket.AF_UNIX) as client:
                return [attempt(lambda: client.connect(name)), attempt(lambda: os.kill(parent, 0))]

        assert in_child(lambda: work(walled=False)) == ["0", "0"]
        assert in_child(lambda: work(walled=True)) == ["EPERM", "0"]
