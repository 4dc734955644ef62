"""What a build finds of the policy: a failed one says what to allow, one that worked says what was enough."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import policyjail
import pytest
from policyjail import PYTHON, Home, python, spec

from stockade.errors import ServiceError
from stockade.narrowing import Wanted, least
from stockade.records.exercise import ExerciseResult
from stockade.records.lock import Lock, LockedSpec
from stockade.records.spec import Exercise, Ready, Service, Spec
from stockade.records.trace import Trace
from stockade.trial import Trial

pytestmark = pytest.mark.skipif(bool(policyjail.UNABLE), reason=policyjail.UNABLE)

SERVER = """
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        word = self.rfile.readline().strip()
        try:
            reply = str(eval(word))
        except OSError as error:
            reply = error.strerror
        self.wfile.write(reply.encode())
socketserver.TCPServer.allow_reuse_address = True
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(('127.0.0.1', 4243))
socketserver.TCPServer(('127.0.0.1', 4242), Handler).serve_forever()
"""


def ask(word: str) -> str:
    connect = "import socket; s = socket.create_connection(('127.0.0.1', 4242))"
    return json.dumps([PYTHON, "-c", f"{connect}; s.send(b'''{word}\n'''); print(s.recv(999).decode())"])


def server(*words: str, policy: str = "", user: str = "root", setup: str = "") -> str:
    """A server that evaluates what it is sent; each word is an exercise that must not give an error."""
    exercises = [f"[[exercises]]\ncommand = {ask(word)}\nstdout = '^(0|None|[0-9]+)$'" for word in words]
    lines = [f'user = "{user}"', "ready = { tcp = 4242 }", "stop_timeout_s = 5"]
    return spec("server", setup + SERVER, *lines, policy, *exercises)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.run("rm", "--force", "server")


def test_only_the_capabilities_are_kept_without_which_an_exercise_fails(home: Home) -> None:
    words = ("os.chown('/tmp/x', 7, 7)", "os.chmod('/tmp/x', 0o600)")
    report = home.build("server", server(*words, setup="open('/tmp/x', 'w')\n"))
    assert report["proposal"]["capabilities"] == ["chown", "fowner"]


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="makes a call by its number on x86-64")
def test_a_service_that_keeps_a_capability_which_no_other_call_shows_is_given_it(home: Home) -> None:
    """Like chronyd, which first of all sets its capabilities to the few that it may need."""
    wanted = "struct.pack('=6I', 1 << 10, 1 << 10, 0, 0, 0, 0)"
    setup = f"call(126, struct.pack('=II', 0x20080522, 0), {wanted})\n"
    report = home.build("server", server("os.getpid()", setup=setup))
    assert report["proposal"]["capabilities"] == ["net_bind_service"]
    assert len(report["rounds"]) == 1


@pytest.mark.parametrize(("either", "kept"), [(("dac_override", "chown"), "chown"), (("setuid", "kill"), "kill")])
def test_of_two_that_would_do_the_weaker_stays(either: tuple[str, str], kept: str) -> None:
    lock = Lock(spec=LockedSpec(name="x", sha256=""), architecture="x86_64", capabilities=tuple(sorted(either)))
    given = Spec(name="x", service=Service(command=("x",)))
    works = Trial(Trace(where="inside"), (), None, "")
    fails = Trial(Trace(where="inside"), (), ServiceError("no"), "")
    found = least(
        given, lock, works, run=lambda spec, lock: works if set(lock.capabilities) & set(either) else fails,
        good=Wanted(), progress=lambda text: None,
    )  # fmt: skip
    assert found.lock.capabilities == (kept,)


@pytest.mark.parametrize(("seconds", "limit"), [(0.01, 5.0), (0.5, 10.0), (3.0, 20.0)])
def test_a_run_without_a_capability_is_not_waited_for_much_longer_than_one_with_it(
    seconds: float, limit: float
) -> None:
    lock = Lock(spec=LockedSpec(name="x", sha256=""), architecture="x86_64", capabilities=("kill",))
    service = Service(command=("x",), ready=Ready(tcp=1, timeout_s=7))
    given = Spec(name="x", service=service, exercises=(Exercise(command=("y",)),))
    result = ExerciseResult(name="y", passed=True, seconds=seconds)
    works = Trial(Trace(where="inside"), (result,), None, "", ready_s=seconds)
    limits: list[tuple[float, float]] = []

    def run(spec: Spec, _lock: Lock) -> Trial:
        limits.append((spec.service.ready.timeout_s, spec.exercises[0].timeout_s))
        return works

    least(given, lock, works, run=run, good=Wanted(), progress=lambda text: None)
    assert limits == [(min(7.0, limit), limit)]


@pytest.mark.slow
def test_a_service_that_has_to_be_killed_without_a_capability_needs_it(home: Home) -> None:
    """The first process has a child with another id end, and waits for it: without `kill` it waits for ever."""
    setup = """
child = os.fork()
if not child:
    os.setgid(7); os.setuid(7)
    while True: signal.pause()
def end(*_):
    try: os.kill(child, signal.SIGTERM)
    except PermissionError: pass
    os.wait()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
"""
    uid = "open(f'/proc/{child}/status').read().split('Uid:')[1].split()[0]"
    report = home.build("server", server(f"0 if {uid} == '7' else 'wrong'", setup=setup))
    assert report["proposal"]["capabilities"] == ["kill", "setgid", "setuid"]


def test_a_service_that_crashes_at_its_end_without_a_capability_needs_it(home: Home) -> None:
    """The directory that it clears at its end is another user's, and nobody may write to it but that one."""
    setup = """
os.mkdir('/tmp/work'); open('/tmp/work/file', 'w').close(); os.chown('/tmp/work', 7, 7)
def end(*_):
    try: os.unlink('/tmp/work/file')
    except PermissionError: os.abort()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
"""
    report = home.build("server", server("os.getpid()", setup=setup))
    assert report["proposal"]["capabilities"] == ["chown", "dac_override"]


def test_a_service_that_crashes_at_its_end_in_any_case_is_given_no_more(home: Home) -> None:
    report = home.build("server", server("os.getpid()", setup="signal.signal(signal.SIGTERM, lambda *_: os.abort())\n"))
    assert report["proposal"]["capabilities"] == []


def test_a_service_that_is_not_root_is_given_no_capability(home: Home) -> None:
    report = home.build("server", server("os.getpid()", user="nobody"))
    assert report["proposal"]["capabilities"] == []
    lock = next((home.directory / "state" / "jails" / "server" / "generations").glob("*/lock.json"))
    assert json.loads(lock.read_text())["capabilities"] == []


@pytest.mark.slow
def test_a_capability_that_is_missed_without_a_failure_is_told(home: Home) -> None:
    setup = """
open('/tmp/x', 'w')
def quiet():
    try: os.chown('/tmp/x', 7, 7)
    except PermissionError: pass
    return 0
"""
    report = home.build("server", server("quiet()", setup=setup))
    assert report["proposal"]["capabilities"] == []
    assert report["proposal"]["missed"] == [{"capability": "chown", "calls": ["chown `/tmp/x`"]}]


@pytest.mark.slow
def test_failed_build_says_what_was_refused_and_the_lines_that_help(home: Home) -> None:
    home.write("server", server("os.setuid(0)", "socket.socket(17, 3, 3).close()"))
    done = home.run("build", "server")
    assert done.returncode == 1
    assert "error: exercise `" in done.stderr
    assert "refused: socket of AF_PACKET (EAFNOSUPPORT): the policy does not allow `socket:packet`" in done.stderr
    lines = '[policy.syscalls]\nadd = ["socket:packet"]\n\n[policy]\ncapabilities = ["net_raw"]\n'
    assert done.stderr.endswith(f"hint: it works with this in the spec:\n{lines}")
    home.build("server", server("os.setuid(0)", "socket.socket(17, 3, 3).close()", policy=lines))


@pytest.mark.slow
def test_build_fails_when_a_command_ends_otherwise_than_outside(home: Home) -> None:
    home.write("server", spec("server", "socket.socket(17, 3, 3)"))
    done = home.run("build", "server")
    assert done.returncode == 1
    assert "error: the command works outside, not in its jail: status 1 inside, 0 outside\n" in done.stderr
    assert '[policy]\ncapabilities = ["net_raw"]\n' in done.stderr


def test_a_command_may_end_with_any_status_that_it_has_outside_too_which_is_told(home: Home) -> None:
    report = home.build("server", spec("server", "sys.exit(3)"))
    (advice,) = [one for one in report["advice"] if one["code"] == "status"]
    assert advice["message"] == "ended with status 3 outside a jail, which counts as success"
    report = home.build("server", spec("server", "sys.exit(0)"))
    assert not [one for one in report["advice"] if one["code"] == "status"]


@pytest.mark.parametrize(("stop_signal", "told"), [("SIGTERM", 1), ("SIGINT", 0)])
def test_a_service_that_the_signal_does_not_stop_is_told_with_the_keys_that_help(
    home: Home, stop_signal: str, told: int
) -> None:
    """As uwsgi, which reloads at SIGTERM."""
    code = "signal.signal(signal.SIGTERM, lambda *_: None)\n" + SERVER
    lines = ['user = "nobody"', "ready = { tcp = 4242 }", "stop_timeout_s = 2", f'stop_signal = "{stop_signal}"']
    home.write("server", spec("server", code, *lines))
    done = home.run("build", "server")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(
        "note: still ran 2 s after SIGTERM, and had to be killed: name the signal that ends it, as its manual has it, "
        "often SIGINT or SIGQUIT: `stop_signal` in `[service]`; or give it more time: `stop_timeout_s`"
    ) == told


def test_a_peer_that_cannot_be_reached_outside_either_is_no_refusal_of_the_walls(home: Home) -> None:
    ask_elsewhere = "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect_ex(('192.0.2.1', 53))"
    report = home.build("server", server(ask_elsewhere))
    assert report["proposal"]["refused"] == []


@pytest.mark.slow
def test_a_file_that_is_looked_for_and_not_in_the_jail_is_told_with_the_line_that_brings_it(home: Home) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        path = Path(directory) / "app.conf"
        path.write_text("x\n")
        code = f"path = '{path}'\nos.stat(path); open(path).read()"
        home.write("server", spec("server", code))
        done = home.run("build", "server")
        assert done.returncode == 1
        assert done.stderr.endswith(f'hint: put this into the spec to allow it:\n[files]\ninclude = ["{path}"]\n')
        home.build("server", spec("server", code, f"[files]\ninclude = ['{path}']"))


def test_proposal_has_preset_ports_and_written_directories(home: Home) -> None:
    text = server("open('/var/lib/misc/state', 'w').write('a')", "open('/tmp/scratch', 'w').write('a')")
    proposal = home.build("server", text)["proposal"]
    assert (proposal["preset"], proposal["preset_now"], proposal["add"]) == ("strict", "default", [])
    assert proposal["ports"] == ["4242/tcp", "4243/udp"]
    assert proposal["written"] == {"/tmp": "tmpfs", "/var/lib/misc": "volume"}
    assert 30 < proposal["used"] < 120 and proposal["unused"] > 100


@pytest.mark.slow
def test_proposal_is_a_spec_in_which_everything_works(home: Home) -> None:
    words = ("open('/var/lib/misc/state', 'w').write('a')", "os.setpriority(0, 0, 5)", "socket.socket(16, 3).close()")
    home.build("server", server(*words))
    toml = home.output("explain", "server", "--policy")
    report = home.build("server", server(*words, policy=toml))
    assert report["proposal"]["lines"] == []
    assert all(exercise["passed"] for exercise in report["exercises"])


def test_proposal_adds_the_call_that_no_preset_has(home: Home) -> None:
    policy = '[policy]\ncapabilities = ["net_raw"]\nsyscalls = { preset = "none" }'
    words = ("call(239, 0, 0, 0, 0, 0)", "socket.socket(17, 3, 3).close()")
    proposal = home.build("server", server(*words, policy=policy))["proposal"]
    assert (proposal["preset"], proposal["add"]) == ("shell", ["socket:packet"])


def test_calls_of_an_exercise_inside_count_too(home: Home) -> None:
    inside = f'[[exercises]]\nwhere = "inside"\ncommand = {json.dumps(python("socket.socket(16, 3, 0)"))}'
    proposal = home.build("server", server("os.getpid()", policy=inside))["proposal"]
    assert proposal["preset"] == "default"


def test_jail_that_was_not_tried_has_no_proposal(home: Home) -> None:
    home.write("server", server("os.getpid()"))
    home.output("build", "server", "--no-verify")
    done = home.run("explain", "server", "--policy")
    assert done.returncode == 1
    assert done.stderr.startswith("error: jail `server` was built without being tried")
