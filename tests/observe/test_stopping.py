"""Which processes a service in its jail is stopped by."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, cast

import pytest

from stockade.observe import service
from stockade.observe.tracer import Tracer
from stockade.records.spec import Service

THREADS = """
import sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("up", flush=True); sys.stdin.read()
"""


class Ended:
    running = False

    def wait(self, timeout_s: float) -> None:
        pass


def test_a_process_is_told_to_stop_and_none_of_its_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(service, "_signal", lambda pid, number: sent.append(pid))
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", THREADS], **options) as process,
        subprocess.Popen([sys.executable, "-c", THREADS], **options) as other,
    ):
        for one in (process, other):
            assert one.stdout is not None and one.stdout.readline() == b"up\n"
        traced = [int(task) for one in (process, other) for task in os.listdir(f"/proc/{one.pid}/task")]
        assert len(traced) == 4
        jailed = service.JailedService(
            process.pid, os.getpid(), cast(Tracer, Ended()), Service(command=("x",)), lambda: traced, lambda: False
        )
        jailed.stop()
        for one in (process, other):
            assert one.stdin is not None
            one.stdin.close()
    assert sorted(sent) == sorted((process.pid, other.pid))
