from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade import observe
from stockade.errors import ExerciseError, HostError, ServiceError
from stockade.observe import Identity, Observation
from stockade.records.seed import Seed
from stockade.records.spec import Exercise, Ready, Service, Spec

PYTHON = "/usr/bin/python3"
SOURCE = str(Path(__file__).resolve().parents[2] / "src")
Outside = Callable[..., Observation]
pytestmark = pytest.mark.usefixtures("as_root")


def need(program: str, package: str) -> str:
    path = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        pytest.skip(f"not installed here: `apt-get install {package}`")
    return path


def paths(observation: Observation, *operations: str, error: str = "") -> set[str]:
    return {
        access.path
        for access in observation.trace.accesses
        if access.error == error and (not operations or access.operation in operations)
    }


def programs(observation: Observation) -> list[str]:
    return [execution.program for execution in observation.trace.executions]


SERVER = """
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self): self.wfile.write(open(self.rfile.readline().strip()).read().encode())
socketserver.TCPServer.allow_reuse_address = True
socketserver.TCPServer(("127.0.0.1", 4242), Handler).serve_forever()
"""


def ask(path: str) -> tuple[str, ...]:
    connect = "import socket; s = socket.create_connection(('127.0.0.1', 4242))"
    return (PYTHON, "-c", f"{connect}; s.send(b'{path}\\n'); print(s.recv(999).decode())")


def test_a_tool_is_observed_to_its_end_with_its_status(outside: Outside) -> None:
    observation = outside("sh", "-c", "cat /etc/hostname; exit 3")
    assert observation.status == 3
    assert observation.log == Path("/etc/hostname").read_text()
    assert programs(observation) == ["/usr/bin/sh", "/usr/bin/cat"]
    assert "/etc/hostname" in paths(observation, "read")


def test_a_module_that_is_imported_is_opened_and_its_directory_listed(outside: Outside) -> None:
    observation = outside(PYTHON, "-c", "import json")
    assert any("/json/" in path for path in paths(observation, "read"))
    assert any(path.endswith("/json") for path in paths(observation, "list"))


def test_every_process_of_a_pipeline_is_traced(outside: Outside) -> None:
    observation = outside("sh", "-c", "cat /etc/passwd | sort | uniq -c | (cd /usr; tee share/../x) >/dev/null")
    assert {os.path.basename(program) for program in programs(observation)} == {"sh", "cat", "sort", "uniq", "tee"}
    assert "/usr/share/../x" in paths(observation, "create")


def test_the_first_line_of_a_script_that_it_makes_and_runs_is_told(outside: Outside) -> None:
    make = "printf '#!/bin/sh -e\nexit 0\n' > made && printf ': >&2\n' > plain && chmod 700 made plain"
    observation = outside("/bin/sh", "-c", f"cd /tmp && {make} && ./made && /usr/bin/true && ./plain")
    told = {execution.program: execution.line for execution in observation.trace.executions}
    assert told.pop("/usr/bin/chmod") == told.pop("/usr/bin/true") == told.pop("/bin/sh") == ""
    assert told == {"/tmp/./made": "#!/bin/sh -e"}


def test_clients_are_not_in_the_services_trace(outside: Outside) -> None:
    exercise = Exercise(
        command=("sh", "-c", f'cat /etc/fstab /etc/debian_version; {PYTHON} -c "{ask("/etc/hostname")[2]}"')
    )
    observation = outside(PYTHON, "-c", SERVER, exercises=(exercise,), ready=Ready(tcp=4242))
    assert [result.passed for result in observation.exercises] == [True]
    assert "/etc/hostname" in paths(observation, "read")
    assert "/etc/debian_version" not in paths(observation)
    assert set(programs(observation)) == {PYTHON}


def test_what_runs_behind_the_walls_is_in_the_trace(outside: Outside) -> None:
    exercises = (
        Exercise(command=("cat", "/etc/debian_version"), where="inside", stdout=r"\d"),
        Exercise(command=("sort",), input="b\na\n", stdout="^a\nb$", where="inside"),
    )
    observation = outside("sleep", "100", exercises=exercises)
    assert [result.passed for result in observation.exercises] == [True, True]
    assert programs(observation) == ["/usr/bin/sleep", "/usr/bin/cat", "/usr/bin/sort"]
    assert "/etc/debian_version" in paths(observation, "read")


def test_several_processes_of_a_server_and_its_shutdown_are_observed(outside: Outside) -> None:
    nginx = need("nginx", "nginx-light")
    need("curl", "curl")
    seeds = [Seed(path="/etc/nginx/sites-enabled/default", content=b"server{listen 8080;root /srv;}", mode=0o644)]
    seeds.append(Seed(path="/srv/index.html", content=b"the page", mode=0o644))
    exercise = Exercise(command=("curl", "-sS", "--fail", "http://127.0.0.1:8080/"), stdout="^the page$")
    observation = outside(nginx, "-g", "daemon off;", exercises=(exercise,), ready=Ready(tcp=8080), seeds=seeds)
    assert len({access.pid for access in observation.trace.accesses}) >= 2
    assert 33 in observation.trace.uids
    assert "/srv/index.html" in paths(observation, "read")
    assert "/run/nginx.pid" in paths(observation, "unlink")
    assert ("listen", 8080) in {(item.operation, item.port) for item in observation.trace.sockets}


def test_a_daemon_that_goes_into_the_background_is_followed(outside: Outside) -> None:
    nginx = need("nginx", "nginx-light")
    exercise = Exercise(command=("cat", "/run/nginx.pid"), stdout=r"^\d+$")
    observation = outside(nginx, exercises=(exercise,), ready=Ready(tcp=80), forks=True)
    assert observation.exercises[0].passed
    assert "/run/nginx.pid" in paths(observation, "unlink")


def test_a_daemon_that_is_not_said_to_fork_gets_the_line_to_add(outside: Outside) -> None:
    nginx = need("nginx", "nginx-light")
    with pytest.raises(ServiceError) as caught:
        outside(nginx, exercises=(Exercise(command=("true",)),))
    assert caught.value.message == f"`{nginx}` went into the background"
    assert (
        caught.value.hint == "set `forks = true` in `[service]`, or give it the option that keeps it in the foreground"
    )


def test_sshd_is_observed_with_its_separated_processes(outside: Outside) -> None:
    sshd = need("sshd", "openssh-server")
    need("ssh-keygen", "openssh-client")
    config = b"HostKey /etc/ssh/test_key\nUsePAM no\nPidFile none\n"
    seeds = [
        Seed(path="/run/sshd", type="directory", mode=0o755),
        Seed(path="/etc/ssh/test_config", content=config, mode=0o644),
        Seed(path="/etc/ssh/test_key", content=new_key(), mode=0o600, secret=True),
    ]
    exercise = Exercise(
        command=("sh", "-c", "ssh-keyscan -p 2222 -t ed25519 127.0.0.1 2>/dev/null"), stdout="ssh-ed25519"
    )  # fmt: skip
    command = (sshd, "-D", "-e", "-p", "2222", "-f", "/etc/ssh/test_config")
    observation = outside(*command, exercises=(exercise,), ready=Ready(tcp=2222), seeds=seeds)
    assert "/run/sshd" in paths(observation, "chroot")
    assert "/etc/ssh/test_key" in paths(observation, "read")
    assert "Received signal 15" in observation.log
    assert not Path("/etc/ssh/test_key").exists()


def new_key() -> bytes:
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/key"]
        subprocess.run(command, check=True, timeout=20)
        return Path(directory, "key").read_bytes()


def test_service_runs_as_its_own_id(outside: Outside) -> None:
    observation = outside("sh", "-c", "id -u; id -g; id -G", identity=Identity(1234, 99, (7,)))
    assert observation.log.split() == ["1234", "99", "99", "7"]


def test_output_of_a_service_that_gave_up_root_can_be_opened_by_name(outside: Outside) -> None:
    observation = outside("sh", "-c", "echo by name > /dev/stderr", identity=Identity(1234, 1234))
    assert (observation.status, observation.log) == (0, "by name\n")


def test_a_setuid_program_is_given_its_rights_when_the_fast_way_fails(outside: Outside) -> None:
    su = need("su", "login")
    assert os.stat(su).st_mode & stat.S_ISUID
    seeds = [
        Seed(
            path="/etc/pam.d/su",
            content=b"auth sufficient pam_permit.so\naccount sufficient pam_permit.so\n",
            mode=0o644,
        )
    ]
    told: list[str] = []
    exercise = Exercise(command=("su", "-c", "cat /etc/shadow >/dev/null && id -u"), where="inside", stdout="^0$")
    observation = outside(
        "sleep", "100", exercises=(exercise,), seeds=seeds, identity=Identity(65534, 65534), progress=told.append
    )  # fmt: skip
    assert observation.exercises[0].passed
    assert "once more, with setuid programs in force" in told


# What goes wrong.


def test_a_service_that_never_is_ready_says_what_was_waited_for_and_shows_its_log(outside: Outside) -> None:
    with pytest.raises(ServiceError) as caught:
        outside("sh", "-c", "echo starting up; exec sleep 100", ready=Ready(tcp=4242, timeout_s=0.5))
    assert caught.value.message == "the service was not ready within 0.5 s: waited until TCP port 4242 is listened to"
    assert caught.value.log == "starting up\n"


def test_a_service_that_listens_elsewhere_is_told_where(outside: Outside) -> None:
    with pytest.raises(ServiceError) as caught:
        outside(PYTHON, "-c", SERVER, ready=Ready(tcp=4243, timeout_s=1))
    assert caught.value.hint is not None and caught.value.hint.startswith("it listens to tcp 4242; ")


def test_a_service_that_ends_early_is_an_error_with_its_log(outside: Outside) -> None:
    with pytest.raises(ServiceError) as caught:
        outside("sh", "-c", "echo no configuration >&2; exit 4", ready=Ready(tcp=1))
    assert caught.value.message == "`sh` ended early, with status 4"
    assert caught.value.log == "no configuration\n"


def test_a_service_that_crashes_is_an_error_that_names_the_signal(outside: Outside) -> None:
    with pytest.raises(ServiceError) as caught:
        outside("sh", "-c", "kill -SEGV $$")
    assert caught.value.message == "`sh` was ended by SIGSEGV"


def test_a_missing_program_is_named(outside: Outside) -> None:
    with pytest.raises(ServiceError) as caught:
        outside("/opt/none/at-all")
    assert caught.value.message == "cannot run `/opt/none/at-all`: there is no such program"


def test_a_script_without_its_interpreter_is_an_error(outside: Outside) -> None:
    seeds = [Seed(path="/srv/script", content=b"#!/opt/no/interpreter\n", mode=0o755)]
    with pytest.raises(ServiceError) as caught:
        outside("/srv/script", seeds=seeds)
    assert caught.value.message == "`/srv/script` could not be executed (status 127)"


def test_a_failing_exercise_says_that_the_program_does_not_work_outside_either(outside: Outside) -> None:
    exercise = Exercise(name="a page", command=("sh", "-c", "echo 404 >&2; exit 22"))
    with pytest.raises(ExerciseError) as caught:
        outside(PYTHON, "-c", SERVER, exercises=(exercise,), ready=Ready(tcp=4242))
    assert caught.value.message == (
        "exercise `a page` does not work outside a jail either: it ended with status 22, not 0"
    )  # fmt: skip
    assert caught.value.hint == "it said: 404"


def test_a_service_that_dies_during_an_exercise_is_mentioned(outside: Outside) -> None:
    exercise = Exercise(name="kill", command=(PYTHON, "-c", "import os; os.kill(2, 9); raise SystemExit(1)"))
    with pytest.raises(ExerciseError) as caught:
        outside(PYTHON, "-c", SERVER, exercises=(exercise,), ready=Ready(tcp=4242))
    assert caught.value.message.endswith(f"it ended with status 1, not 0; `{PYTHON}` was ended by SIGKILL")


def test_a_host_without_strace_gets_the_package_to_install(
    outside: Outside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        outside("true")
    assert caught.value.message == "`strace` is not installed, and nothing can be observed without it"
    assert caught.value.hint == "install it: `apt-get install strace`"


def test_nothing_is_left_after_a_service_that_ignores_its_stop_signal() -> None:
    token = f"token-{os.getpid()}-{os.urandom(4).hex()}"
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)"
    )
    service = Service(command=(PYTHON, "-c", code, token), ready=Ready(log="^up$"), stop_timeout_s=0.3)
    observation = observe.outside(
        Spec(name="stubborn", service=service), seeds=(), substitutions={}, identity=observe.Identity()
    )  # fmt: skip
    assert observation.log == "up\n"
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != "self"]
    assert not any(token.encode() in line for line in lines)
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""


def test_a_low_limit_of_open_files_is_enough() -> None:
    code = """
import resource
from stockade import observe
from stockade.records.spec import Service, Spec
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
spec = Spec(name="low", service=Service(command=("cat", "/etc/hostname")))
seen = observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity())
print([seen.status, any(access.path == "/etc/hostname" for access in seen.trace.accesses)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[0, True]\n", "")


@pytest.mark.parametrize("given", [{}, {"TZ": "Asia/Tokyo"}])
def test_the_tracer_leaves_no_mark_in_the_services_environment(given: dict[str, str], outside: Outside) -> None:
    environment = {"PATH": "/usr/bin:/bin", "ONLY": "this", **given}
    lines = set(outside("env", environment=environment).log.splitlines())
    assert lines == {f"{name}={value}" for name, value in environment.items()}
