"""What runs beside UML for its network, and ends with the keeper."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any

from .spawn import descendants

__all__ = ["Helpers"]

_START_S = 15.0
_STEP_S = 0.001
_END_S = 2.0


class Helpers:
    """Processes that were started. Each has the keeper's end as its death signal (PR_SET_PDEATHSIG of prctl(2))."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115

    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._started]

    def carry_out(self, step: dict[str, Any]) -> bool:
        """Do one step; False for one that waits and has to be tried again. RuntimeError with what is wrong.

        start: a command that goes on. run: one that ends; `{pid}` in it is the started one.
        await: a path. await_namespace: the started one has its own network. request: on the socket `api`.
        """
        try:
            if "start" in step:
                self._start(step["start"])
            elif "run" in step:
                self._run(step["run"], [int(number) for number in step.get("pass", ())])
            elif "await" in step:
                self._alive()
                return os.path.exists(step["await"])
            elif "await_namespace" in step:
                self._alive()
                return os.readlink(f"/proc/{self.pids()[-1]}/ns/net") != os.readlink("/proc/self/ns/net")
            elif "request" in step:
                self._alive()
                try:
                    _request(step["api"], step["request"])
                except ConnectionRefusedError:  # bound, and not listened on yet
                    return False
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            self._errors.seek(0)
            text = self._errors.read(4096).decode("utf-8", "replace").strip()
            raise RuntimeError(
                f"the guest's network could not be made: {error}" + (f": {text}" if text else "")
            ) from error
        return True

    def wait(self, steps: list[dict[str, Any]]) -> None:
        """Do all steps, one after the other."""
        end = time.monotonic() + _START_S
        for step in steps:
            while not self.carry_out(step):
                if time.monotonic() > end:
                    raise RuntimeError(f"the guest's network could not be made: no `{step.get('await', 'namespace')}`")
                time.sleep(_STEP_S)

    def _start(self, command: list[str]) -> None:
        self._started.append(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors, env=_environment()
            )
        )

    def _run(self, command: list[str], passed: list[int]) -> None:
        pid = str(self.pids()[-1]) if self._started else ""
        done = subprocess.run(
            [word.replace("{pid}", pid) for word in command], stdin=subprocess.DEVNULL, stdout=self._errors,
            stderr=self._errors, pass_fds=passed, timeout=_START_S, env=_environment(), check=False,
        )  # fmt: skip
        for number in passed:
            os.close(number)
        if done.returncode != 0:
            raise RuntimeError(f"`{os.path.basename(command[0])} {command[1]}` failed")

    def _alive(self) -> None:
        for process in self._started:
            if process.poll() is not None:
                raise RuntimeError("slirp4netns ended early")

    def end(self) -> None:
        """End them, with all that came from them."""
        for process in self._started:
            # The first process of their pid namespace goes before the one that waits for it, or nobody would reap it.
            for pid in descendants(process.pid)[1:2]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()
            process.wait()
        self._started = []
        self._errors.close()


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def _request(path: str, request: dict[str, Any]) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(_START_S)
        connection.connect(path)
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    if b"error" in answer:
        raise RuntimeError(answer.decode("utf-8", "replace").strip())
