"""How long until a guest runs, and until its service answers: walls `vm`, `jail,vm`, `jail,vm,jail`, in one run.

    PYTHONPATH=src python3 benchmarks/vm_boot.py [--runs N] [--debian] [--qemu-kernel FILE] [--json]

Needs root, user-mode-linux, slirp4netns, nginx. `console` is the time from UML's start to the first line of the
guest's PID 1, `ready` that from the call, and `answer` from the call to the first HTTP answer on the published port.
Beside it stand gVisor (`runsc do`) and QEMU's microvm with the kernel FILE and a busybox initramfs, each until the
first line of its first process, where they run. `--debian` makes a Debian image with nginx first (mmdebstrap, about
half a minute). Medians.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import vm_shared as guests

from stockade import machines
from stockade.errors import StockadeError
from stockade.records.image import Image
from stockade.vm import debian, store

WALLS = (("vm",), ("jail", "vm"), ("jail", "vm", "jail"))
FIRST_LINE = b"first line\n"
QEMU = (
    "qemu-system-x86_64", "-M", "microvm,isa-serial=on", "-m", "128M", "-no-reboot", "-nodefaults", "-no-user-config",
    "-nographic", "-serial", "stdio",
)  # fmt: skip
# microvm has no timer to calibrate by.
QEMU_WORDS = "console=ttyS0 quiet reboot=t panic=-1 rdinit=/init tsc_early_khz=2000000 lpj=4000000 no_timer_check"
QEMU_LIMIT_S = 20.0


def boot(image: Image, walls: tuple[str, ...]) -> float:
    """Seconds from UML's start to the first line of the guest's PID 1."""
    started = guests.run("boot", image, walls)
    try:
        while "console" not in started.seconds:
            started.event(guests.LIMIT_S)
        return started.seconds["console"]
    finally:
        started.close()
        machines.discard(started.name)


def ready(image: Image, walls: tuple[str, ...]) -> float:
    """Seconds from the call, with a new disk, until a command can be run in the guest."""
    began = time.perf_counter()
    started = guests.run("ready", image, walls)
    seconds = time.perf_counter() - began
    started.close()
    machines.discard(started.name)
    return seconds


def answer(walls: tuple[str, ...]) -> float:
    """Seconds from the call that runs the nginx jail to the first HTTP answer."""
    port = guests.published(80)
    began = time.perf_counter()
    started = machines.start_jail(guests.NGINX, walls, publish=[port], memory=guests.MEMORY)
    try:
        return guests.first_answer(port.port, began)
    finally:
        started.kill()
        machines.discard(started.name)


def debian_answer(image: Image) -> float:
    """Seconds from the start of a Debian guest to the first HTTP answer of its nginx."""
    port = guests.published(80)
    store.create("debian-1", image, memory=256 << 20, walls=("jail", "vm"), network="publish", publish=(port,))
    began = time.perf_counter()
    started = machines.start_guest("debian-1")
    try:
        return guests.first_answer(port.port, began)
    finally:
        started.close()
        machines.discard(started.name)


def first_line(command: list[str], limit_s: float) -> float:
    """Seconds until a program's first line; the program is ended then. TimeoutError."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    seen = b""
    try:
        while time.perf_counter() - began < limit_s:
            seen += process.stdout.read() or b""
            if FIRST_LINE.strip() in seen:
                return time.perf_counter() - began
            if process.poll() is not None and FIRST_LINE.strip() not in seen:
                break
            time.sleep(0.001)
        raise TimeoutError(f"`{command[0]}` said no first line within {limit_s:g} s")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def initramfs(directory: Path) -> Path:
    """A cpio archive of busybox whose init says one line."""
    root = directory / "initramfs"
    for name in ("bin", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(guests.BUSYBOX, root / "bin/busybox")
    os.mknod(root / "dev/console", 0o600 | 0o020000, os.makedev(5, 1))
    (root / "init").write_text("#!/bin/busybox sh\necho first line\nexec /bin/busybox reboot -f\n")
    (root / "init").chmod(0o755)
    target = directory / "initramfs.cpio"
    with open(target, "wb") as file:
        subprocess.run(
            ["/bin/busybox", "sh", "-c", "find . | busybox cpio -o -H newc"], cwd=root, stdout=file, check=True,
            stderr=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
    return target


def others(report: measure.Report, directory: Path, qemu_kernel: str) -> dict[str, Callable[[], float]]:
    """gVisor and QEMU, where they work here; why not otherwise goes into the report's notes."""
    ways: dict[str, Callable[[], float]] = {}
    candidates: dict[str, list[str]] = {}
    if shutil.which("runsc"):
        candidates["runsc do"] = ["runsc", "--network=none", "do", "/bin/busybox", "echo", "first line"]
    else:
        report.notes.append("gVisor: `runsc` is not installed")
    if shutil.which(QEMU[0]) and qemu_kernel:
        archive = initramfs(directory)
        words = ["-kernel", qemu_kernel, "-initrd", str(archive), "-append", QEMU_WORDS]
        for name, accelerator in (
            ("kvm", ["-accel", "kvm", "-cpu", "host,migratable=no,arch-capabilities=off"]), ("tcg", ["-accel", "tcg"]),
        ):  # fmt: skip
            candidates[f"qemu microvm, {name}"] = [*QEMU, *accelerator, *words]
    else:
        report.notes.append("QEMU: needs `qemu-system-x86_64` and `--qemu-kernel FILE`")
    for name, command in candidates.items():
        try:
            first_line(command, QEMU_LIMIT_S)
        except (TimeoutError, OSError) as error:
            report.notes.append(f"{name} does not run here: {error}")
        else:
            ways[name] = partial(first_line, command, QEMU_LIMIT_S)
    return ways


def main() -> int:
    parser = measure.arguments(__doc__, runs=11)
    parser.add_argument("--debian", action="store_true", help="make and start a Debian image too")
    parser.add_argument("--qemu-kernel", metavar="FILE", default="", help="a kernel for QEMU's microvm")
    options = parser.parse_args()
    guests.need("linux.uml", "slirp4netns", "nginx")
    report = measure.Report("start of guests")
    with guests.home() as directory:
        machines.prepare(("jail", "vm"))
        image = guests.image("tiny", guests.tree(directory / "tree"))
        ways = {",".join(walls): partial(boot, image, walls) for walls in WALLS[:2]}
        beside = others(report, directory, options.qemu_kernel)
        report.add("first line", measure.in_turn({**ways, **beside}, options.runs))
        for walls in ways:
            median = next(figure for figure in report.figures if figure.name == f"first line: {walls}")
            report.figures.append(measure.Figure(f"first line of PID 1, {walls}", median.value / 1000, "s", most=0.10))
        for name in beside:
            report.compare("first line", "jail,vm", name)
        report.add(
            "new guest, ready for commands",
            measure.in_turn({",".join(walls): partial(ready, image, walls) for walls in WALLS[:2]}, options.runs),
        )
        guests.build_nginx()
        report.add(
            "nginx jail, first answer",
            measure.in_turn({",".join(walls): partial(answer, walls) for walls in WALLS}, options.runs),
        )
        for walls in WALLS:
            key = f"nginx jail, first answer: {','.join(walls)}"
            median = next(figure for figure in report.figures if figure.name == key)
            report.figures.append(measure.Figure(f"{key}, target", median.value / 1000, "s", most=0.40))
        if options.debian:
            try:
                made = debian.image_of_debian("bookworm", "debian", packages=["nginx-light"])
            except StockadeError as error:
                report.notes.append(f"Debian: {error.message}")
            else:
                samples = measure.in_turn({"jail,vm": partial(debian_answer, made)}, options.runs, warm=1)
                report.add("Debian with nginx, first answer", samples)
                value = report.figures[-1].value / 1000
                report.figures.append(measure.Figure("Debian with nginx, first answer, target", value, "s", most=1.0))
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
