"""What a guest costs and how quick it is: medians of one run. `python benchmarks/vm_guests.py` as root or not.

Marker: from the keeper, which executes UML, to the first word of the guest's PID 1.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from stockade import machines
from stockade.records.image import Image
from stockade.records.publish import Published
from stockade.vm import control, images, incident, manage, snapshots, sparse, staging, store
from stockade.vm.start import stop

ROUNDS = 9
MEMORY = 64 << 20
MANY = 20


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def line(name: str, values: list[float], unit: str, limit: str) -> None:
    print(f"{name:52} {statistics.median(values):8.3f} {unit:5} (aim {limit}; {min(values):.3f} to {max(values):.3f})")


def small_tree(root: Path) -> None:
    for name in ("bin", "etc", "root", "srv"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "cat", "httpd", "true", "dd", "mount", "head"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "srv/index.html").write_text("x" * 1000)


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def boots(image: Image, walls: tuple[str, ...]) -> None:
    first, ready, ends = [], [], []
    for _ in range(ROUNDS):
        guest = store.create("bench", image, memory=MEMORY, walls=walls)
        started = machines.start_guest(guest.name)
        started.close()
        first.append(started.seconds["console"])
        ready.append(started.seconds["ready"])
        ends.append(timed(lambda: stop("bench")))
        store.remove("bench")
    line(f"{','.join(walls)}: exec to the first line of PID 1", first, "s", "0.10")
    line(f"{','.join(walls)}: exec to a guest that takes commands", ready, "s", "-")
    line(f"{','.join(walls)}: clean stop", ends, "s", "-")


def disks(image: Image) -> None:
    store.create("bench", image, memory=MEMORY)
    machines.start_guest("bench").close()
    snaps, restores, clones = [], [], []
    for number in range(ROUNDS):
        snaps.append(timed(partial(snapshots.create, "bench", f"s{number}")))
    for number in range(ROUNDS):
        clones.append(timed(partial(snapshots.clone, "bench", f"c{number}", snapshot="s0")))
    size = sparse.allocated(store.disk("c0"))
    for number in range(ROUNDS):
        store.remove(f"c{number}")

    def restore() -> None:
        incident.restore("bench", "s0")
        machines.start_guest("bench").close()
        control.execute("bench", ["true"])

    for _ in range(ROUNDS):
        restores.append(timed(restore))
    fresh = [timed(lambda: store.create("fresh", image, memory=MEMORY)) for _ in range(1)]
    print(f"{'new guest before it writes':52} {sparse.allocated(store.disk('fresh')) / 1024:8.0f} KiB   (aim 64)")
    store.remove("fresh")
    line("new guest", fresh, "s", "0.02")
    line("snapshot of a running guest of 64 MB", snaps, "s", "0.3")
    line(f"clone of a snapshot ({size >> 10} KiB)", clones, "s", "0.02")
    line("restore to answering", restores, "s", "1")
    line("command in a guest", [timed(lambda: control.execute("bench", ["true"])) for _ in range(ROUNDS)], "s", "-")
    machines.discard("bench")


def network(image: Image) -> None:
    outer = port()
    store.create(
        "bench", image, memory=512 << 20, network="publish",
        publish=(Published(address="127.0.0.1", port=outer, target=80),),
    )  # fmt: skip
    machines.start_guest("bench").close()
    control.execute(
        "bench",
        [
            "sh",
            "-c",
            "mount -t tmpfs none /srv; head -c 100000000 /dev/zero > /srv/big; echo x > /srv/small; httpd -h /srv",
        ],
        timeout_s=60,
    )
    speeds, gets = [], []
    for path, found, form in (("big", speeds, "%{speed_download}"), ("small", gets, "%{time_total}")):
        for _ in range(ROUNDS):
            done = subprocess.run(
                ["curl", "-sS", "-o", os.devnull, "-w", form, f"http://127.0.0.1:{outer}/{path}"],
                capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            found.append(float(done.stdout) / (1e6 if path == "big" else 1))
    line("published port: large file", speeds, "MB/s", "200")
    line("published port: small GET", gets, "s", "0.003")
    machines.discard("bench")


def many(image: Image) -> None:
    names = [f"many{number}" for number in range(MANY)]
    for name in names:
        store.create(name, image, memory=MEMORY)
    began = time.monotonic()
    for name in names:
        machines.start_guest(name).close()
    seconds = time.monotonic() - began
    held = [float(manage.state(name).memory_used or 0) / 1e6 for name in names]
    print(f"{f'{MANY} guests of 64 MB, one after the other':52} {seconds:8.3f} s")
    line("memory that one of them holds", held, "MB", "-")
    for name in names:
        machines.discard(name)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="stockade-bench-") as place:
        os.environ["STOCKADE_HOME"] = f"{place}/home"
        small_tree(Path(place) / "tree")
        record = Image(name="small", sha256="", size=0, mtime=0, origin="directory")
        image = staging.image_of("small", Path(place) / "tree", record)
        machines.prepare(("jail",))
        try:
            boots(image, ("vm",))
            boots(image, ("jail", "vm"))
            disks(image)
            network(image)
            many(image)
        finally:
            for name in store.names():
                machines.discard(name)
            images.remove("small", [])


if __name__ == "__main__":
    main()
