"""The verbs about what is kept of a jail: list, status, rollback, rm."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator

from stockade import contain, specfile
from stockade.build.generations import Store
from stockade.build.lock import encode_spec
from stockade.cli import console, machinelife, names
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import NotFoundError, StateError, StockadeError
from stockade.records.generation import Generation
from stockade.records.lock import Lock
from stockade.records.report import Ended, GenerationLine, Jail, ListReport, Process, StatusReport

__all__ = ["process", "register"]


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    add_verb(subparsers, "list", list_jails, json=True, help="list the jails that were built")

    parser = add_verb(subparsers, "status", status, json=True, help="tell where a jail stands")
    parser.add_argument("name", metavar="NAME", help="name of the jail")

    parser = add_verb(
        subparsers, "rollback", rollback,
        help="make an earlier generation the current one",
        description="Make the generation before the current one, or generation NUMBER, the current one. A jail "
        "that runs goes on with its own until it is started again.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the jail")
    parser.add_argument("number", metavar="NUMBER", type=int, nargs="?", help="a number that `stockade status` shows")

    parser = add_verb(
        subparsers, "rm", remove,
        help="remove a jail with all that is kept of it",
        description="Remove a jail's generations, its secrets and its volumes. Its spec stays.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="+", help="name of the jail")
    parser.add_argument("--force", action="store_true", help="do not ask")


def list_jails(arguments: argparse.Namespace) -> None:
    """List the caller's jails."""
    running = {jail.name for jail in contain.running()}
    running |= {name for name in names.known() if machinelife.process(name)}
    jails = tuple(_line(name, running=name in running) for name in names.known())
    if arguments.json:
        console.json_report(ListReport(jails=jails))
        return
    if not jails:
        console.next_command("`stockade recipes` lists what can be built")
        return
    console.rows(
        (
            (
                jail.name, str(jail.generation or "-"), str(jail.files), console.size(jail.bytes),
                "yes" if jail.running else "no",
            )
            for jail in jails
        ),
        heading=("NAME", "GENERATION", "FILES", "SIZE", "RUNNING"),
    )  # fmt: skip


def _line(name: str, *, running: bool) -> Jail:
    store = Store(name)
    current = store.current()
    files, size = _counted(current.lock) if current is not None else (0, 0)
    return Jail(
        name=name, generation=current.number if current is not None else 0, generations=store.generations(),
        files=files, bytes=size, running=running,
    )  # fmt: skip


def _counted(lock: Lock) -> tuple[int, int]:
    files = [entry for entry in lock.entries if entry.type == "file"]
    return len(files), sum(entry.size for entry in files)


def status(arguments: argparse.Namespace) -> None:
    """Tell where a jail stands."""
    store = names.existing(arguments.name)
    current = store.current()
    running: Process | None
    try:
        running = process(contain.find(arguments.name))
    except (NotFoundError, StateError):
        running = machinelife.process(arguments.name)
    spec, changed = _spec(arguments.name, current)
    report = StatusReport(
        name=arguments.name,
        running=running,
        ended=next((ended(jail) for jail in contain.ended() if jail.name == arguments.name), None),
        generations=tuple(_generations(store, current)),
        spec=spec,
        spec_changed=changed,
    )
    if arguments.json:
        console.json_report(report)
        return
    console.text(f"{report.name}: {_life(running, report.ended)}")
    console.text(f"spec: {report.spec or 'none any more'}{', changed since the build' if report.spec_changed else ''}")
    console.rows(
        (
            (
                f"{generation.number}{' *' if generation.current else ''}", _date(generation.built),
                str(generation.files), console.size(generation.bytes),
            )
            for generation in report.generations
        ),
        heading=("GENERATION", "BUILT", "FILES", "SIZE"),
    )  # fmt: skip
    if report.spec_changed:
        console.next_command(f"`stockade build {report.name}`")
    elif running is None:
        console.next_command(f"`stockade start {report.name}`")


def process(jail: contain.RunningJail) -> Process:
    """Return the report of a running jail."""
    used = jail.usage()
    return Process(
        name=jail.name,
        instance=jail.instance,
        pid=jail.init_pid,
        service_pid=jail.pid or None,
        generation=_number(jail.generation),
        uptime_s=round(jail.uptime_s, 3),
        processes=used.processes or 0,
        state=jail.state,
        memory=used.memory_bytes,
        cpu_s=None if used.cpu_seconds is None else round(used.cpu_seconds, 3),
        restarts=jail.restarts,
        ports=jail.ports(),
        helper_lost=jail.helper_lost,
        supervised=jail.supervisor_pid != 0,
    )


def ended(jail: contain.EndedJail) -> Ended:
    """Return the report of a jail that ended by itself."""
    return Ended(
        name=jail.name, instance=jail.instance, generation=_number(jail.generation), status=jail.status,
        failed=jail.failed, restarts=jail.restarts, ended=round(jail.ended, 3),
    )  # fmt: skip


def state(jail: Process) -> str:
    """Say how a running jail is, with what is wrong with it."""
    faults = (("no network helper", jail.helper_lost), ("no supervisor", not jail.supervised))
    return ", ".join((jail.state, *(words for words, holds in faults if holds)))


def _number(generation: str) -> int | None:
    last = generation.rpartition("/")[2]
    return int(last) if last.isdecimal() else None


def _life(running: Process | None, last: Ended | None) -> str:
    if running is None and last is not None:
        how = "" if last.status is None else f" with status {last.status}"
        return f"not running, ended{how} on {_date(last.ended)}"
    if running is None:
        return "not running"
    if running.state == "restarting":
        return f"ended and waiting for its restart {running.restarts}, generation {running.generation}"
    since = console.duration(running.uptime_s)
    return f"{state(running)} for {since}, generation {running.generation}, pid {running.pid}"


def _generations(store: Store, current: Generation | None) -> Iterator[GenerationLine]:
    """Describe each generation; of one that is damaged it is noted why it is left out."""
    for number in store.generations():
        try:
            generation = store.generation(number)
        except (NotFoundError, StateError) as error:
            console.note(f"generation {number} is of no use: {error.message}")
            continue
        yield _generation(generation, current=current is not None and number == current.number)


def _generation(generation: Generation, *, current: bool) -> GenerationLine:
    files, size = _counted(generation.lock)
    return GenerationLine(
        number=generation.number, current=current, built=(generation.path / "lock.json").stat().st_mtime, files=files,
        bytes=size,
    )  # fmt: skip


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _spec(name: str, current: Generation | None) -> tuple[str | None, bool]:
    """Return the spec's path, if it is still there, and whether it says something else than what was built."""
    try:
        path = specfile.find(name)
        spec = specfile.load(path)
    except NotFoundError:
        return None, False
    except StockadeError:
        return str(path), True
    built = current.lock.spec.sha256 if current is not None else ""
    return str(path), hashlib.sha256(encode_spec(spec)).hexdigest() != built


def rollback(arguments: argparse.Namespace) -> None:
    """Switch to an earlier generation."""
    generation = names.existing(arguments.name).rollback(arguments.number)
    console.text(f"{arguments.name}: generation {generation.number} is current")
    console.next_command(f"`stockade start {arguments.name}`, after `stockade stop {arguments.name}` if it runs")


def remove(arguments: argparse.Namespace) -> None:
    """Remove jails."""
    stores = [names.existing(name) for name in arguments.name]
    running = {jail.name for jail in contain.running()}
    for store in stores:
        if store.name in running:
            raise StateError(f"jail `{store.name}` is running", hint=f"`stockade stop {store.name}` first")
        machinelife.refuse_running(store.name)
    listed = ", ".join(f"`{store.name}`" for store in stores)
    console.confirm(f"remove {listed} with secrets and volumes", force=arguments.force)
    for store in stores:
        machinelife.remove(store.name)
        store.remove()
        console.note(f"removed `{store.name}`")
