"""What a guest costs against a chroot jail of the same files: the paper's trade-off, in numbers of one run.

    PYTHONPATH=src python3 benchmarks/vm_cost.py [--runs N] [--many N] [--json]

Needs root, user-mode-linux, busybox-static. The same busybox does the same work in a jail and in a guest (walls
`jail,vm`): system calls (dd of single bytes), fork and exec, pure computation, memory that is touched. Each time is
that of one command, from its call to its end, given as guest / jail. Then N guests of 64 MB run at once, each asked
what it sees and measured for what it holds on the host.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure
import vm_shared as guests

from stockade import contain, machines, workflow
from stockade.records.spec import Files, Limits, Service, Spec
from stockade.vm import control, manage, store

#: Commands by what they cost; each takes long enough that its start does not matter.
WORK = {
    "system calls: 200,000 reads and writes of a byte": "dd if=/dev/zero of=/dev/null bs=1 count=100000 2>/dev/null",
    "fork and exec: 200 times": "i=0; while [ $i -lt 200 ]; do /bin/busybox true; i=$((i+1)); done",
    "computation: sha256 of 16 MB": "dd if=/dev/zero bs=65536 count=256 2>/dev/null | busybox sha256sum >/dev/null",
    "a shell that counts to 200,000": "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done",
    "memory: 16 MB touched in one piece": "dd if=/dev/zero of=/dev/null bs=16M count=1 2>/dev/null",
}  # fmt: skip
NOTHING = "true"


def in_jail(script: str) -> None:
    """Run a script in the jail."""
    with contain.launch(
        "work", argv=["/bin/busybox", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as running:
        if running.wait(300) != 0:
            sys.exit(f"error: `{script}` failed in the jail")


def in_guest(script: str) -> None:
    """Run a script in the guest."""
    status, _, text = control.execute("work", ["/bin/busybox", "sh", "-c", script], timeout_s=300)
    if status != 0:
        sys.exit(f"error: `{script}` failed in the guest: {text!r}")


def memory_of_jail() -> float:
    """MB that the processes of an idle jail hold."""
    with contain.launch(
        "work", argv=["/bin/busybox", "sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as running:
        time.sleep(0.3)
        pids = [running.pid, *([running.init_pid] if running.init_pid else [])]
        found = manage.held_memory(_with_children(pids)) / 1e6
        running.kill()
        running.wait(20)
    return found


def _with_children(pids: Sequence[int]) -> list[int]:
    found = list(dict.fromkeys(pids))
    for pid in found:
        try:
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except FileNotFoundError:
            continue
        found += [int(word) for word in text.split() if int(word) not in found]
    return found


def main() -> int:
    parser = measure.arguments(__doc__, runs=5)
    parser.add_argument("--many", type=int, default=20, help="guests at once (default %(default)s)")
    options = parser.parse_args()
    guests.need("linux.uml", "busybox")
    report = measure.Report("cost of a guest against a jail")
    with guests.home() as directory:
        machines.prepare(("jail", "vm"))
        image = guests.image("tiny", guests.tree(directory / "tree"))
        workflow.build(
            Spec(
                name="work", service=Service(command=("/bin/busybox", "true"), user="nobody"),
                files=Files(include=("/bin/busybox",)), limits=Limits(memory="256M"),
            ),
            observe=False, verify=False,
        )  # fmt: skip
        guests.run("work", image, ("jail", "vm")).close()
        for name, script in {"a command that does nothing": NOTHING, **WORK}.items():
            ways = {"guest": partial(in_guest, script), "jail": partial(in_jail, script)}
            report.add(name, measure.in_turn(ways, options.runs, warm=1))
            report.compare(name, "guest", "jail")
        idle = manage.state("work").memory_used or 0
        report.figures.append(measure.Figure("memory held: guest of 64 MB after that", idle / 1e6, "MB"))
        report.figures.append(measure.Figure("memory held: idle jail", memory_of_jail(), "MB"))
        machines.discard("work")
        began = time.perf_counter()
        for number in range(options.many):
            guests.run(f"many-{number}", image, ("jail", "vm")).close()
        report.figures.append(measure.Figure(f"{options.many} guests up", time.perf_counter() - began, "s"))
        held = [manage.state(name).memory_used or 0 for name in store.names()]
        answering = sum(control.execute(name, ["/bin/busybox", "true"])[0] == 0 for name in store.names())
        report.figures += [
            measure.Figure("guests that answer at once", answering, "", least=options.many),
            measure.Figure("memory held by all of them", sum(held) / 1e6, "MB"),
            measure.Figure("memory held by one, idle", statistics.median(held) / 1e6, "MB"),
        ]
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
