"""Run each probe in a process of its own with a time limit, and report line by line."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable

from . import channels, information, kernel, machine, mounts, processes, resources, rights, roots
from .results import Result, held
from .world import World, hear, say

__all__ = ["PROBES", "main"]

PROBES: dict[str, Callable[[World], Result]] = {
    **roots.PROBES, **mounts.PROBES, **processes.PROBES, **rights.PROBES, **kernel.PROBES, **channels.PROBES,
    **resources.PROBES, **information.PROBES,
}  # fmt: skip


def main(path: str) -> None:
    """Carry out the request in the file `path`."""
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    world, beyond = World(request), World(request | request["beyond"])
    say({"ready": os.getpid()})
    if hear() != "go":
        return
    for name in world.request["probes"]:
        probe, place = (PROBES[name], world) if name in PROBES else (machine.PROBES[name], beyond)
        say({"id": name, **_carry_out(probe, place)})


def _carry_out(probe: Callable[[World], Result], world: World) -> Result:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer = json.dumps(probe(world)).encode()
        except Exception as error:
            answer = json.dumps(_fault(f"{type(error).__name__}: {error}")).encode()
        while answer:
            answer = answer[os.write(writer, answer) :]
        os._exit(0)
    os.close(writer)
    text = b""
    while select.select([reader], [], [], world.request["time_limit_s"])[0]:
        piece = os.read(reader, 65536)
        if not piece:
            break
        text += piece
    else:
        os.kill(pid, signal.SIGKILL)
        text = json.dumps(_fault("it did not end in time")).encode()
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not text and code == -signal.SIGSYS:
        return held("SIGSYS")
    if not text:
        return _fault(f"it ended with {signal.Signals(-code).name if code < 0 else code}")
    result: Result = json.loads(text)
    return result


def _fault(why: str) -> Result:
    return {"outcome": "fault", "detail": why, "evidence": {}}
