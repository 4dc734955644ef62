"""A jail is stood in for by a second view whose process waits at its gate, as a warden's does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from stockade import observe
from stockade.errors import ObserveError
from stockade.observe.exercise import client
from stockade.observe.jailed import root_of
from stockade.observe.parse import Recorded, parse, read
from stockade.observe.tracer import Tracer
from stockade.records.exercise import Outcome
from stockade.records.seed import Seed
from stockade.records.spec import Exercise, Ready, Service, Spec

PYTHON = "/usr/bin/python3"
pytestmark = pytest.mark.usefixtures("as_root", "strace")

SERVER = """
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        try: self.wfile.write(open(self.rfile.readline().strip()).read().encode())
        except OSError as error: self.wfile.write(error.strerror.encode())
print("serving", flush=True)
socketserver.TCPServer(("127.0.0.1", 4242), Handler).serve_forever()
"""


def ask(path: str) -> tuple[str, ...]:
    connect = "import socket; s = socket.create_connection(('127.0.0.1', 4242))"
    return (PYTHON, "-c", f"{connect}; s.send(b'{path}\\n'); print(s.recv(999).decode())")


@dataclass
class Jail:
    view: observe.View
    process: observe.Process
    gate: int

    def observe(self, spec: Spec, **options: object) -> observe.Observation:
        given: dict[str, object] = {
            "pid": self.process.pid,
            "init_pid": self.view.pid,
            "release": lambda sockets: os.write(self.gate, b"g"),
            "alive": lambda: self.process.wait(0) is None,
            "log": lambda: os.pread(self.view.log, 65536, 0).decode(),
            "run_inside": self.run_inside,
            "substitutions": {},
            **options,
        }
        return observe.inside(spec, **given)  # type: ignore[arg-type]

    def run_inside(self, command: Sequence[str], text: bytes, timeout_s: float, attach: observe.Attach) -> Outcome:
        return client(self.view)(command, text, timeout_s)


@contextlib.contextmanager
def jail(spec: Spec) -> Iterator[Jail]:
    seeds = [Seed(path="/srv/in-jail", content=b"from the jail", mode=0o644)]
    reader, writer = os.pipe()
    with observe.View.open(seeds=seeds) as view:
        process = view.spawn(
            spec.service.command, environment={"PATH": "/usr/bin:/bin:/usr/sbin"}, stdout=view.log, stderr=view.log,
            gate=reader, services=False,
        )  # fmt: skip
        os.close(reader)
        try:
            yield Jail(view, process, writer)
        finally:
            process.close()
            os.close(writer)


def server(*exercises: Exercise, **ready: object) -> Spec:
    service = Service(command=(PYTHON, "-c", SERVER), ready=Ready(**(ready or {"tcp": 4242})), stop_timeout_s=3)  # type: ignore[arg-type]
    return Spec(name="inside", service=service, exercises=exercises)


def paths(observation: observe.Observation, *, error: str = "") -> set[str]:
    return {access.path for access in observation.trace.accesses if access.error == error}


def test_exercises_run_against_the_jail_and_only_the_service_is_traced() -> None:
    spec = server(
        Exercise(command=ask("/srv/in-jail"), stdout="^from the jail$"),
        Exercise(command=("cat", "/etc/debian_version")),
        Exercise(command=("sh", "-c", 'cat "$STOCKADE_ROOT/srv/in-jail"'), stdout="from the jail"),
        Exercise(command=("cat", "/srv/in-jail"), stdout="from the jail", where="inside"),
    )
    with jail(spec) as stand_in:
        observation = stand_in.observe(spec)
        assert stand_in.process.wait(5) is not None
    assert [result.passed for result in observation.exercises] == [True] * 4, observation.exercises
    assert observation.failure is None
    trace = observation.trace
    assert trace.where == "inside"
    assert [item.program for item in trace.executions] == [PYTHON]
    assert "/srv/in-jail" in paths(observation) and "/etc/debian_version" not in paths(observation)
    assert {"execve", "accept4", "sendto", "mmap"} <= set(trace.syscalls)
    assert observation.log == "serving\n"


def test_a_missing_file_is_in_the_trace_of_an_exercise_that_fails() -> None:
    spec = server(Exercise(command=ask("/srv/absent"), stdout="^contents$"), Exercise(command=("true",)))
    with jail(spec) as stand_in:
        observation = stand_in.observe(spec)
    assert [result.passed for result in observation.exercises] == [False, True]
    assert "/srv/absent" in paths(observation, error="ENOENT")


def test_a_service_that_never_is_ready_gives_its_trace_and_the_reason() -> None:
    service = Service(command=("sh", "-c", "cat /srv/absent; exit 1"), ready=Ready(tcp=4242, timeout_s=5))
    spec = Spec(name="inside", service=service, exercises=(Exercise(command=("true",)),))
    with jail(spec) as stand_in:
        observation = stand_in.observe(spec)
    assert observation.failure is not None and observation.failure.message == "`sh` ended early"
    assert "No such file" in observation.failure.log
    assert observation.exercises == ()
    assert "/srv/absent" in paths(observation, error="ENOENT")


def test_client_seeds_are_in_the_clients_view_and_not_in_the_jail() -> None:
    seeds = [Seed(path="/run/stockade/secrets/key", content=b"secret", mode=0o600)]
    spec = server(
        Exercise(command=("cat", "${secret-file:key}"), stdout="^secret$"),
        Exercise(command=ask("/run/stockade/secrets/key"), stdout="No such file"),
    )
    with jail(spec) as stand_in:
        substitutions = {"secret-file:key": "/run/stockade/secrets/key"}
        observation = stand_in.observe(spec, client_seeds=seeds, substitutions=substitutions)
    assert [result.passed for result in observation.exercises] == [True, True]


def test_the_gate_opens_only_when_the_tracer_is_attached() -> None:
    spec = server()
    tracers = []
    with jail(spec) as stand_in:

        def release(sockets: tuple[int, ...]) -> None:
            status = Path(f"/proc/{stand_in.process.pid}/status").read_text()
            tracers.append(int(status.partition("TracerPid:")[2].split()[0]))
            os.write(stand_in.gate, b"g")

        stand_in.observe(spec, release=release)
    assert len(tracers) == 1 and tracers[0] > 0


def test_a_daemon_in_the_background_is_stopped_with_its_signal() -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if nginx is None:
        pytest.skip("not installed here: `apt-get install nginx-light`")
    service = Service(command=(nginx,), ready=Ready(tcp=80), forks=True, stop_timeout_s=3)
    spec = Spec(name="inside", service=service, exercises=(Exercise(command=("true",)),))
    with jail(spec) as stand_in:
        observation = stand_in.observe(spec, alive=lambda: True)
        assert [found["pid"] for found in stand_in.view.processes()] == [1]
    unlinked = {access.path for access in observation.trace.accesses if access.operation == "unlink"}
    assert "/run/nginx.pid" in unlinked


def test_paths_behind_a_chroot_are_those_that_the_service_sees(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("etc", "work"):
        (root / name).mkdir(parents=True)
    (root / "etc/file").write_text("x")
    waiting = f"""
import os, sys
os.chroot({os.fspath(root)!r}); os.chdir("/work"); print("up", flush=True); sys.stdin.read(1)
os.stat("../etc/file"); os.stat("/etc/file"); os.open("/etc", 0); os.chdir("/etc"); os.stat("file")
"""
    process = subprocess.Popen([PYTHON, "-c", waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"up\n"
        base = root_of(process.pid)
        directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        with Tracer.attach(process.pid, directory=directory, prefix="t") as tracer:
            process.stdin.write(b"g")
            process.stdin.close()
            assert tracer.wait(10)
        recorded = [Recorded("t", process.pid, directory="/work")]
        lines = [("0", process.pid, 'execve("/x", ["x"], 0x1 /* 0 vars */) = 0\n'), *read(directory, recorded)]
        os.close(directory)
        trace = parse(lines, recorded, base=base)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [(access.operation, access.path) for access in trace.accesses][1:] == [
        ("stat", "/work/../etc/file"),
        ("stat", "/etc/file"),
        ("read", "/etc"),
        ("chdir", "/etc"),
    ]


def test_a_process_that_is_traced_already_cannot_be_observed() -> None:
    spec = server()
    with (
        jail(spec) as stand_in,
        Tracer.attach(stand_in.process.pid, directory=stand_in.view.scratch, prefix="a"),
        pytest.raises(ObserveError) as caught,
    ):
        Tracer.attach(stand_in.process.pid, directory=stand_in.view.scratch, prefix="b")
    assert caught.value.message.startswith(f"`strace` cannot attach to process {stand_in.process.pid}: ")
