"""What disks cost: new clones, snapshots of a running guest, going back to one until the service answers. In one run.

    PYTHONPATH=src python3 benchmarks/vm_disk.py [--runs N] [--json]

Needs root, user-mode-linux, slirp4netns, nginx. Times in ms, medians; a clone's size is what its disk takes on the
host before the guest has written anything.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from functools import partial

import measure
import vm_shared as guests

from stockade import machines
from stockade.records.image import Image
from stockade.vm import incident, snapshots, sparse, store

BASE_BYTES = 512 << 20
_number = itertools.count()


def new_guest(image: Image) -> float:
    """Seconds to make a guest of an image."""
    name = f"new-{next(_number)}"
    began = time.perf_counter()
    store.create(name, image)
    seconds = time.perf_counter() - began
    store.remove(name)
    return seconds


def clone(of: str) -> float:
    """Seconds to clone a guest that has not written anything."""
    name = f"clone-{next(_number)}"
    began = time.perf_counter()
    snapshots.clone(of, name)
    seconds = time.perf_counter() - began
    store.remove(name)
    return seconds


def snapshot(of: str) -> float:
    """Seconds to keep the state of a guest."""
    name = f"kept-{next(_number)}"
    began = time.perf_counter()
    snapshots.create(of, name)
    seconds = time.perf_counter() - began
    snapshots.remove(of, name)
    return seconds


def restored(name: str, to: str, port: int) -> float:
    """Seconds from the order to go back until a client has an answer."""
    began = time.perf_counter()
    incident.restore(name, to)
    machines.start_guest(name).close()
    return guests.first_answer(port, began)


def main() -> int:
    options = measure.arguments(__doc__, runs=11).parse_args()
    guests.need("linux.uml", "slirp4netns", "nginx")
    report = measure.Report("disks of guests")
    with guests.home() as directory:
        machines.prepare(("jail", "vm"))
        image = guests.image("base", guests.tree(directory / "tree"), size=BASE_BYTES)
        store.create("parent", image, memory=guests.MEMORY, walls=("jail", "vm"))
        sizes = [float(sparse.allocated(store.disk("parent")))]
        ways = {"new guest": partial(new_guest, image), "clone": partial(clone, "parent")}
        report.add("disk of 512 MB", measure.in_turn(ways, options.runs))
        for way in ways:
            median = statistics.median(report.samples["disk of 512 MB"][way])
            report.figures.append(measure.Figure(f"{way}, target", median * 1000, "ms", most=20))
        snapshots.clone("parent", "sized")
        sizes.append(float(sparse.allocated(store.disk("sized"))))
        report.figures.append(measure.Figure("clone before it writes", max(sizes) / 1024, "KiB", most=64))
        machines.start_guest("parent").close()
        report.add("running guest of 64 MB", measure.in_turn({"snapshot": partial(snapshot, "parent")}, options.runs))
        median = statistics.median(report.samples["running guest of 64 MB"]["snapshot"])
        report.figures.append(measure.Figure("snapshot of a running guest", median, "s", most=0.3))
        machines.discard("parent")
        guests.build_nginx()
        port = guests.published(80)
        web = machines.guest_of_jail(
            guests.NGINX, ("jail", "vm"), name="web", memory=guests.MEMORY, publish=[port], network="publish"
        )
        machines.start_guest(web.name).close()
        guests.first_answer(port.port, time.perf_counter())
        snapshots.create("web", "good", good=True)
        ways = {"to a snapshot": partial(restored, "web", "good", port.port),
                "to the image": partial(restored, "web", "", port.port)}  # fmt: skip
        report.add("restore to answering", measure.in_turn(ways, options.runs, warm=1))
        for way in ways:
            median = statistics.median(report.samples["restore to answering"][way])
            report.figures.append(measure.Figure(f"restore {way}, target", median, "s", most=1.0))
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
