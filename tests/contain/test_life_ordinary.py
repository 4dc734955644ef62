"""The life of a jail that an ordinary user started: restarts, a killed supervisor, readiness, what it uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_walls_ordinary import facts, kind, place  # the fixtures of an ordinary user

__all__ = ["kind", "place"]

WATCH = """
import signal, time, msgspec
from stockade import lifecycle
from stockade.build.generations import Store
from stockade.contain import wire
QUICK = [wire.record(wire.RESTART, wire.RESTART_ALWAYS, 40, 80, 60_000)]

def spec(generation):
    (generation / "spec.json").write_bytes(msgspec.json.encode(msgspec.convert(
        {"name": "test", "service": SERVICE}, Spec)))

def found():
    return contain.find("test")
"""


def seen(place: Path, service: str, code: str) -> dict[str, object]:
    made = f"SERVICE = {service}\ngeneration = build({{'service': SERVICE}})\nspec(generation)\n"
    return facts(place, WATCH + made + code)


@pytest.mark.usefixtures("kind")
def test_service_of_an_ordinary_user_is_restarted_until_it_is_stopped(place: Path) -> None:
    service = '{"command": ["/bin/sh", "-c", "echo begun; sleep 0.05; exit 3"], "user": "www", "restart": "always"}'
    told = seen(place, service, """
contain.launch("test", detach=True, records=QUICK).close()
restarted = until(lambda: found().restarts >= 3)
supervisor = found().supervisor_pid
contain.stop("test", timeout_s=0.5)
log = b"".join(contain.logs("test")).decode()
tell(restarted=restarted, alive=exists(supervisor), begun=log.count("begun\\n") >= 3,
     said="stockade: the service's life ended (exit 3); restart 1 in 0.0 s" in log,
     left=sorted(path.name for path in places.run().iterdir()))
""")  # fmt: skip
    assert told == {"restarted": True, "alive": False, "begun": True, "said": True, "left": []}


@pytest.mark.usefixtures("kind")
def test_jail_of_an_ordinary_user_outlives_its_supervisor(place: Path) -> None:
    service = '{"command": ["/bin/sh", "-c", "while :; do seq 1 1000; done"], "user": "www"}'
    told = seen(place, service, """
running = contain.launch("test", detach=True)
os.kill(running.supervisor_pid, signal.SIGKILL)
gone = until(lambda: not exists(running.supervisor_pid))
before = found().usage().cpu_seconds
lives = until(lambda: found().usage().cpu_seconds > before + 0.2)
supervisor = found().supervisor_pid
store = Store("test", keep=1)
for _ in range(2):
    with store.new() as building:
        building.commit()
kept = store.generations()
contain.stop("test", timeout_s=0.5)
tell(gone=gone, lives=lives, supervisor=supervisor, init=exists(running.init_pid), kept=kept, pruned=store.prune(1))
""")  # fmt: skip
    assert told == {"gone": True, "lives": True, "supervisor": 0, "init": False, "kept": [1, 3], "pruned": [1]}


@pytest.mark.usefixtures("kind")
def test_start_of_an_ordinary_user_waits_until_the_service_is_ready(place: Path) -> None:
    service = (
        '{"command": ["/bin/sh", "-c", "sleep 0.5; touch /tmp/up; exec sleep 100"], "user": "www",'
        ' "ready": {"file": "/tmp/up", "timeout_s": 10}}'
    )
    told = seen(place, service, """
began = time.monotonic()
jail = lifecycle.start("test")
took = time.monotonic() - began
used = jail.usage()
contain.stop("test", timeout_s=0.5)
tell(waited=0.5 <= took < 5, memory=50_000 < used.memory_bytes < 50_000_000, processes=used.processes)
""")  # fmt: skip
    assert told == {"waited": True, "memory": True, "processes": 2}


@pytest.mark.usefixtures("kind")
def test_port_that_a_users_service_listens_to_is_seen(place: Path) -> None:
    service = (
        '{"command": ["/bin/sh", "-c", "sleep 0.3; exec nc -l -p 7070"], "user": "www",'
        ' "ready": {"tcp": 7070, "timeout_s": 10}}'
    )
    told = seen(place, service, """
began = time.monotonic()
lifecycle.start("test")
tell(waited=0.3 <= time.monotonic() - began < 5)
contain.stop("test", timeout_s=0.5)
""")  # fmt: skip
    assert told == {"waited": True}
