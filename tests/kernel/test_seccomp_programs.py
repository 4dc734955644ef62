"""Real programs behind the filters, in the running kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stockade.kernel.seccomp import compile_filter
from stockade.kernel.syscalls import host_architecture

# Loads the filter in the file named first, then becomes the command.
_LOADER = """
import os, sys
from child import load_filter
load_filter(open(sys.argv[1], "rb").read())
os.execvp(sys.argv[2], sys.argv[2:])
"""

NODE = """
const http = require('http'), child = require('child_process'), {Worker} = require('worker_threads')
const server = http.createServer((request, response) => response.end('page')).listen(0, '127.0.0.1', () =>
  http.get({port: server.address().port, host: '127.0.0.1'}, answer => {
    answer.on('data', data => console.log('' + data))
    answer.on('end', () => {
      console.log(('' + child.execSync('echo child')).trim())
      const worker = new Worker('require("worker_threads").parentPort.postMessage("worker")', {eval: true})
      worker.on('message', message => { console.log(message); server.close() })
    })
  }))
"""
JAVA = """
public class Work {
    public static void main(String[] arguments) throws Exception {
        var pool = java.util.concurrent.Executors.newFixedThreadPool(4);
        System.out.println(pool.submit(() -> { System.gc(); return "thread"; }).get());
        var server = new java.net.ServerSocket(0);
        new java.net.Socket("127.0.0.1", server.getLocalPort());
        server.accept();
        System.out.println("connected");
        System.out.println(new ProcessBuilder("true").start().waitFor());
        pool.shutdown();
    }
}
"""


def behind(preset: str, directory: Path, command: list[str]) -> list[str]:
    filter_file = directory / f"{preset}.bpf"
    filter_file.write_bytes(compile_filter(preset, architecture=host_architecture()))
    return [sys.executable, "-c", _LOADER, str(filter_file), *command]


@pytest.fixture
def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(Path(__file__).parent))


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"`{program}` is not installed")


@pytest.mark.parametrize("preset", ["strict", "default"])
def test_node_serves_forks_and_starts_workers(preset: str, tmp_path: Path, environment: dict[str, str]) -> None:
    needs("node")
    command = behind(preset, tmp_path, ["node", "-e", NODE])
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (answer.stdout, answer.stderr) == ("page\nchild\nworker\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["strict", "default"])
def test_java_runs_threads_sockets_and_children(preset: str, tmp_path: Path, environment: dict[str, str]) -> None:
    needs("javac")
    (tmp_path / "Work.java").write_text(JAVA)
    command = behind(preset, tmp_path, ["java", "Work.java"])
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert answer.stdout == "thread\nconnected\n0\n", answer.stderr


@contextlib.contextmanager
def answering(command: list[str], path: Path, environment: dict[str, str]) -> Iterator[socket.socket]:
    """A connection to the Unix socket that `command` serves."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            end = time.monotonic() + 20
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                while True:
                    try:
                        client.connect(os.fspath(path))
                        break
                    except OSError:
                        assert process.poll() is None, "the server ended early"
                        assert time.monotonic() < end, "the server never answered"
                        time.sleep(0.02)
                yield client
        finally:
            process.terminate()


def test_redis_keeps_a_key_and_saves_it_in_a_child(tmp_path: Path, environment: dict[str, str]) -> None:
    needs("redis-server")
    server = [
        "redis-server", "--port", "0", "--unixsocket", str(tmp_path / "socket"), "--dir", str(tmp_path), "--save", "",
    ]  # fmt: skip
    with answering(behind("default", tmp_path, server), tmp_path / "socket", environment) as client:
        exchanges = [(b"SET key value", b"+OK"), (b"GET key", b"$5\r\nvalue"), (b"BGSAVE", b"+Background")]
        for command, expected in exchanges:
            client.sendall(command + b"\r\n")
            assert client.recv(4096).startswith(expected)
        end = time.monotonic() + 10
        while not (tmp_path / "dump.rdb").exists():
            assert time.monotonic() < end, "the child saved nothing"
            time.sleep(0.02)
