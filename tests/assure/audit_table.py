"""For each rule a tree that breaks it, and one that is like it and does not."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from audit_trees import PLAIN, Tree, secret_texts

from stockade.records.closure import Evidence
from stockade.records.lock import LockDirectory
from stockade.records.spec import Limits, Mount, Network, Policy, Service, Syscalls
from stockade.records.trace import Access, Socket, Trace

Change = Callable[[Tree], None]

HASH = "$y$j9T$" + "a" * 40
UNUSED = (Evidence(kind="spec", detail="`files.programs`"),)
USED = (Evidence(kind="access", detail="executed by /usr/bin/true"),)
ELF_JUNK = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x03\0\x3e\0" + b"\xff" * 44


def file(path: str, content: str | bytes = "x", *, mode: int = 0o444, owner: tuple[int, int] = (0, 0)) -> Change:
    return lambda tree: tree.write(path, content, mode=mode, owner=owner) and None


def directory(path: str, *, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> Change:
    return lambda tree: tree.directory(path, mode=mode, owner=owner) and None


def link(path: str, target: str) -> Change:
    return lambda tree: tree.link(path, target)


def node(path: str, kind: int, major: int, minor: int) -> Change:
    def make(tree: Tree) -> None:
        tree.directory(os.path.dirname(path))
        os.mknod(tree.path(path), kind | 0o666, os.makedev(major, minor))

    return make


def accounts(passwd: str = PLAIN, group: str = "root:x:0:\n", shadow: str = "root:*:::::::\n") -> Change:
    def make(tree: Tree) -> None:
        tree.write("/etc/passwd", passwd)
        tree.write("/etc/group", group)
        tree.write("/etc/shadow", shadow, mode=0o400)

    return make


def jail(trace: Trace | None = None, capabilities: tuple[str, ...] | None = None, **changes: object) -> Change:
    def make(tree: Tree) -> None:
        tree.as_jail(**changes)
        tree.trace = trace or tree.trace
        if capabilities is not None:
            tree.changes["capabilities"] = capabilities

    return make


def volume(**limits: int) -> Change:
    def make(tree: Tree) -> None:
        tree.as_jail()
        tree.changes["directories"] = (LockDirectory(path="/srv", mode=0o755, volume="srv", **limits),)

    return make


def both(*changes: Change) -> Change:
    def make(tree: Tree) -> None:
        for change in changes:
            change(tree)

    return make


def capability(tree: Tree) -> None:
    # struct vfs_ns_cap_data, revision 2: cap_net_raw effective and permitted (linux/capability.h).
    tree.write("/usr/bin/ping", "x", mode=0o555)
    value = (0x02000001).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + b"\0" * 12
    os.setxattr(tree.path("/usr/bin/ping"), "security.capability", value)


def hard_link(tree: Tree) -> None:
    outside = tree.root.parent / "outside"
    outside.write_text("x")
    os.link(outside, tree.path("/etc/inside"))


def hard_links_inside(tree: Tree) -> None:
    tree.write("/etc/one", "x")
    os.link(tree.path("/etc/one"), tree.path("/usr/bin/two"))
    os.link(tree.path("/etc/one"), tree.path("/etc/three"))


def unix_socket(tree: Tree) -> None:
    listener = socket.socket(socket.AF_UNIX)
    place = os.open(tree.root / "etc", os.O_PATH)
    listener.bind(f"/proc/self/fd/{place}/s")
    os.close(place)
    listener.close()


def fifo(tree: Tree) -> None:
    os.mkfifo(tree.path("/etc/fifo"))


def deep(levels: int) -> Change:
    def make(tree: Tree) -> None:
        descriptor = os.open(tree.root, os.O_RDONLY)
        for _ in range(levels):
            os.mkdir("d", dir_fd=descriptor)
            below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        os.close(descriptor)

    return make


def broken(tree: Tree) -> None:
    tree.program("ls")
    next(tree.path("/usr/lib").rglob("libselinux.so.1")).unlink()


def working(tree: Tree) -> None:
    tree.program("ls")


def unused_library(tree: Tree) -> None:
    working(tree)
    libc = next(tree.path("/usr/lib").rglob("libc.so.6"))
    unused = next(Path("/usr/lib").rglob("libz.so.1")).read_bytes()
    tree.write(f"/{libc.parent.relative_to(tree.root)}/libz.so.1", unused)


def host_package(tree: Tree, files: str, name: str = "sample", version: str = "2-1") -> None:
    info = tree.host / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (info / f"{name}.list").write_text(files)
    (tree.host / "var/lib/dpkg/status").write_text(f"Package: {name}\nStatus: install ok\nVersion: {version}\n\n")
    (tree.host / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')


def on_host(tree: Tree, path: str, content: str) -> None:
    """Put a file on the tree's host."""
    place = tree.host / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(content)


def copied(content: str) -> Change:
    def make(tree: Tree) -> None:
        host_package(tree, "/usr/bin/tool\n")
        on_host(tree, "/usr/bin/tool", "new")
        tree.write("/usr/bin/tool", content, mode=0o555)

    return make


def tree_package(version: str) -> Change:
    def make(tree: Tree) -> None:
        host_package(tree, "")
        tree.write("/var/lib/dpkg/status", f"Package: sample\nVersion: {version}\n\n")
        tree.write("/etc/os-release", 'ID=debian\nVERSION_ID="12"\n')

    return make


def changed(tree: Tree) -> None:
    tree.as_jail()
    tree.write("/etc/file", "as built")
    tree.after = lambda tree: tree.write("/etc/file", "as found") and None


def host_hash(name: str) -> Change:
    def make(tree: Tree) -> None:
        (tree.host / "etc/shadow").write_text(f"admin:{HASH}:::::::\n")
        accounts(shadow=f"root:{name}:::::::\n")(tree)

    return make


def host_home(home: str) -> Change:
    def make(tree: Tree) -> None:
        (tree.host / "etc/passwd").write_text("ann:x:1000:1000::/home/ann:/bin/bash\n")
        both(accounts(PLAIN + f"ann:x:1000:1000::{home}:/usr/sbin/nologin\n"), directory("/h", owner=(1000, 0)))(tree)

    return make


def with_shell(shell: str) -> Change:
    return both(accounts(f"root:x:0:0::/nonexistent:{shell}\n"), file("/bin/sh", mode=0o555))


def tool(path: str, evidence: tuple[Evidence, ...]) -> Change:
    def make(tree: Tree) -> None:
        tree.as_jail()
        tree.write(path, "x", mode=0o555)
        tree.evidence[path] = evidence
        on_host(tree, path, "x")

    return make


def nothing(tree: Tree) -> None:
    """The plain tree."""


def calls(*names: str, **syscalls: object) -> Change:
    return jail(Trace(where="outside", syscalls=names), policy=Policy(syscalls=Syscalls(**syscalls)))  # type: ignore[arg-type]


def proc(path: str) -> Change:
    trace = Trace(where="outside", accesses=(Access(path=path, operation="read"),))
    return both(jail(trace, policy=Policy(proc="full")), lambda tree: tree.changes.update(proc="full"))


def egress(address: str) -> Change:
    made = Socket(pid=1, operation="connect", family="inet", address=address, port=80)
    return jail(Trace(where="outside", sockets=(made,)), network=Network(mode="private", egress=True))


def accept(code: str, path: str = "", more: str = "") -> Change:
    def make(tree: Tree) -> None:
        tree.baseline = f'[[accept]]\ncode = "{code}"\npath = "{path}"\nreason = "known"\n{more}'

    return make


SETUID_FILE = file("/usr/bin/x", mode=0o4555)
KEY = secret_texts()

RULES: dict[str, tuple[Change, Change]] = {
    "SETUID": (SETUID_FILE, file("/usr/bin/x", mode=0o555)),
    "SETGID": (file("/usr/bin/x", mode=0o2555), directory("/x", mode=0o2755)),
    "FILE-CAPABILITIES": (capability, file("/usr/bin/ping", mode=0o555)),
    "WRITABLE-PROGRAM": (file("/usr/bin/x", mode=0o575, owner=(0, 33)), file("/usr/bin/x", mode=0o775)),
    "WRITABLE-FILE": (file("/etc/x", mode=0o646), file("/etc/x", mode=0o644)),
    "WRITABLE-DIRECTORY": (directory("/x", owner=(33, 33)), directory("/x", mode=0o555)),
    "SHARED-DIRECTORY": (directory("/x", mode=0o1777), directory("/x", mode=0o1755)),
    "NOT-ROOT": (file("/etc/x", mode=0o400, owner=(33, 0)), file("/etc/x", mode=0o440, owner=(0, 33))),
    "HARD-LINK": (hard_link, hard_links_inside),
    "LINK-OUTSIDE": (link("/etc/x", "../../outside"), link("/etc/x", "../usr/../etc/passwd")),
    "LINK-DANGLING": (link("/etc/x", "nothing"), link("/etc/x", "/run/made-at-launch")),
    "LINK-LOOP": (link("/etc/x", "x"), link("/etc/x", "passwd")),
    "DEVICE-RAW": (node("/dev/sda", stat.S_IFBLK, 8, 0), node("/dev/null", stat.S_IFCHR, 1, 3)),
    "DEVICE": (node("/dev/null", stat.S_IFCHR, 10, 200), node("/dev/tty", stat.S_IFCHR, 5, 0)),
    "SOCKET": (unix_socket, nothing),
    "FIFO": (fifo, nothing),
    "PROC-CONTENT": (file("/proc/version"), directory("/proc")),
    "UID0-DOUBLE": (accounts(PLAIN + "toor:x:0:0::/:/usr/sbin/nologin\n"), nothing),
    "PASSWORD-EMPTY": (accounts(shadow="root::::::::\n"), accounts(shadow="root:!:::::::\n")),
    "PASSWORD-OF-HOST": (host_hash(HASH), host_hash("*")),
    "PASSWORD-HASH": (accounts(shadow=f"root:{HASH}:::::::\n"), accounts(shadow="root:!*:::::::\n")),
    "SHADOW-READABLE": (file("/etc/shadow", "root:*:::::::\n", mode=0o444), nothing),
    "ACCOUNT-UNUSED": (
        accounts(PLAIN + "games:x:5:5::/nonexistent:/usr/sbin/nologin\n"),
        both(accounts(PLAIN + "games:x:5:5::/nonexistent:/usr/sbin/nologin\n"), file("/etc/x", owner=(5, 0))),
    ),
    "ACCOUNT-SHELL": (with_shell("/bin/sh"), with_shell("/bin/absent")),
    "ACCOUNT-HOME": (host_home("/home/ann"), host_home("/nonexistent")),
    "PRIVATE-KEY": (file("/etc/key", KEY["a private key in PEM"]), file("/etc/key", "-----BEGIN PRIVATE KEY-----\n")),
    "TOKEN": (file("/etc/x", KEY["a token of GitHub"]), file("/etc/x", "ghp_ is how these tokens begin")),
    "CREDENTIALS": (file("/root/.netrc", "machine a login b password c\n"), file("/root/.netrc", "# none\n")),
    "SHELL": (tool("/usr/bin/dash", UNUSED), tool("/usr/bin/dash", USED)),
    "INTERPRETER": (tool("/usr/bin/python3.11", UNUSED), tool("/usr/bin/python3.11", USED)),
    "COMPILER": (file("/usr/bin/x86_64-linux-gnu-gcc-12", mode=0o555), file("/usr/share/doc/gcc", mode=0o444)),
    "EDITOR": (file("/usr/bin/vim.basic", mode=0o555), file("/usr/lib/apt/methods/ed", mode=0o555)),
    "NETWORK-TOOL": (file("/usr/bin/curl", mode=0o555), file("/usr/bin/curl-config", mode=0o555)),
    "PRIVILEGE-TOOL": (tool("/usr/bin/su", UNUSED), tool("/usr/bin/su", USED)),
    "STALE": (copied("old"), copied("new")),
    "STALE-PACKAGE": (tree_package("2~rc1-9"), tree_package("2-1")),
    "CHANGED": (changed, jail()),
    "LIBRARY-UNUSED": (unused_library, working),
    "ELF-BROKEN": (broken, working),
    "ELF-DAMAGED": (file("/usr/bin/x", ELF_JUNK, mode=0o555), working),
    "ROOT-SERVICE": (
        jail(service=Service(command=("/usr/bin/true",))),
        jail(service=Service(command=("/usr/bin/true",)), capabilities=("setuid",)),
    ),
    "CAPABILITY-UNUSED": (
        jail(policy=Policy(capabilities=("setuid",))),
        jail(Trace(where="outside", uids=(33,)), policy=Policy(capabilities=("setuid",))),
    ),
    "CAPABILITY-BROAD": (jail(policy=Policy(capabilities=("sys_admin",))), jail(policy=Policy(capabilities=()))),
    "SYSCALL-UNUSED": (calls("read", add=("mbind",)), calls("mbind", add=("mbind",))),
    "SYSCALL-UNFILTERED": (calls(preset="none"), calls(preset="strict")),
    "LANDLOCK-OFF": (jail(policy=Policy(landlock=False)), jail()),
    "DEVICE-GRANTED": (jail(policy=Policy(devices=("null", "kvm"))), jail(policy=Policy(devices=("null",)))),
    "PROC-WIDE": (proc("/proc/self/status"), proc("/proc/meminfo")),
    "NETWORK-HOST": (jail(network=Network(mode="host")), jail(network=Network(mode="private"))),
    "EGRESS-UNUSED": (egress("127.0.0.1"), egress("192.0.2.1")),
    "MOUNT-WRITABLE": (
        jail(mounts=(Mount(source="/srv/data", target="/data", writable=True),)),
        jail(mounts=(Mount(source="/srv/data", target="/data"),)),
    ),
    "MOUNT-SENSITIVE": (
        jail(mounts=(Mount(source="/run/docker.sock", target="/d"),)),
        jail(mounts=(Mount(source="/srv/data", target="/data"),)),
    ),
    "WALL-CHROOT": (jail(walls=("chroot",)), jail(walls=("jail",))),
    "LIMIT-MEMORY": (jail(limits=Limits(processes=5)), jail()),
    "LIMIT-PROCESSES": (jail(limits=Limits(memory="64M")), jail()),
    "LIMIT-VOLUME": (volume(size=0), volume(size=64 << 20)),
    "TOO-DEEP": (deep(220), deep(150)),
    "BASELINE-UNUSED": (accept("SETUID", "/usr/bin/x"), both(SETUID_FILE, accept("SETUID", "/usr/bin/*"))),
    "BASELINE-EXPIRED": (
        both(SETUID_FILE, accept("SETUID", "/usr/bin/x", "expires = 2001-01-01")),
        both(SETUID_FILE, accept("SETUID", "/usr/bin/x", "expires = 2901-01-01")),
    ),
    "BASELINE-UNKNOWN": (accept("SETUIDD"), nothing),
}

# These need a mount namespace, an ordinary user or a race: test_audit_hostile.py.
ELSEWHERE = {"MOUNTED", "MOUNTED-PROC", "MOUNTED-SYSTEM", "UNREADABLE", "VANISHED"}
