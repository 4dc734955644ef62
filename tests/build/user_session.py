"""What an ordinary user does with the build, in a process of its own; prints a report as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from samples import Collector, closure_of_tree, no_package, spec

from stockade.build.generations import Store
from stockade.build.leftovers import sweep_removed
from stockade.build.making import build
from stockade.build.secrets import ensure
from stockade.build.verify import verify
from stockade.errors import StockadeError
from stockade.records.closure import Closure, Entry, Evidence, WorkDirectory
from stockade.records.spec import Account, Directory, Secret, Spec


def sample() -> tuple[Closure, Spec]:
    home = Path(os.environ["HOME"])
    (home / "private").mkdir(mode=0o700, exist_ok=True)
    (home / "private/file").write_text("mine")
    (home / "private/file").chmod(0o600)
    collector = Collector()
    collector.add_program("/bin/true")
    entries = [*collector.closure().entries]
    evidence = (Evidence(kind="access"),)
    for found in closure_of_tree(home / "private").entries:
        source, uid, gid = found.source, found.uid, found.gid
        entries.append(Entry(path="/data", type="file", source=source, mode=0o600, uid=uid, gid=gid, evidence=evidence))
    wanted = spec(
        user=os.environ.get("SERVICE_USER", "root"),
        groups=tuple(os.environ.get("SERVICE_GROUPS", "").split()),
        accounts=(Account(name="bob", uid=2000, home="/home/bob"),),
        directories={"/srv": Directory(kind="volume", owner="bob", mode="0700")},
        secrets={"k": Secret(kind="ssh-key", path="/etc/k", owner="bob")},
    )
    return Closure(entries=tuple(entries), tmpfs=(WorkDirectory(path="/run/x"),)), wanted


def main() -> dict[str, object]:
    report: dict[str, object] = {}
    closure, wanted = sample()
    store = Store("sample")
    secrets = ensure(wanted, store.secrets)
    first = build(closure, wanted, store=store, secrets=secrets, package_of=no_package)
    second = build(closure, wanted, store=store, secrets=secrets, package_of=no_package)
    report["same"] = (first.path / "lock.json").read_bytes() == (second.path / "lock.json").read_bytes()
    report["verified"] = [difference.kind for difference in verify(second.rootfs, second.lock)]
    report["owners"] = {entry.path: [entry.uid, entry.gid] for entry in second.lock.entries}
    report["on disk"] = {
        path: [os.lstat(f"{second.rootfs}{path}").st_uid, os.lstat(f"{second.rootfs}{path}").st_gid]
        for path in ("/", "/usr/bin/true", "/etc/passwd", "/data")
    }
    report["mode of data"] = oct(os.lstat(f"{second.rootfs}/data").st_mode & 0o7777)
    (store.directory / "generations/.building-0-dead").mkdir()
    report["swept"] = store.sweep()
    for _ in range(3):
        build(closure, wanted, store=store, secrets=secrets, package_of=no_package)
    report["generations"] = store.generations()
    store.remove()
    report["left"] = [*os.listdir(store.directory.parent), sweep_removed(store.ids)]
    report["children"] = subprocess.run(
        ["ps", "-o", "comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, timeout=10, check=False
    ).stdout.split()
    return report


if __name__ == "__main__":
    try:
        json.dump(main(), sys.stdout)
    except StockadeError as error:
        json.dump({"error": error.message, "hint": error.hint, "kind": type(error).__name__}, sys.stdout)
        sys.exit(1)
