"""Start a command as a process of its own, without waiting until it has imported PyTorch and Lightning.

A server, started by the first test that needs one, imports them once and forks a child for every command. The child is
what a user would have started: it has its own folder, environment, arguments, pipes and exit code, takes signals, and
imports elara anew.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "hydra.main", "hydra._internal.hydra", "hydra._internal.utils", "rich.progress", "rich.table", "torch._dynamo",
    "lightning.pytorch", "safetensors.torch", "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip
READ_AT_IMPORT = ("OMP_", "MKL_", "TORCH_", "PYTORCH_", "CUDA_", "MPL", "HF_", "LD_", "PYTHON")  # of those libraries

_servers: dict[str, socket.socket] = {}  # by the variables that they have read
_asking = threading.Lock()


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A process, with those parts of `subprocess.Popen[str]` that tests use. Its stdin is empty."""

    def __init__(self, module: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str]) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        (stdout, out), (stderr, err), (status, told) = os.pipe(), os.pipe(), os.pipe()
        self.stdout = open(stdout, encoding="utf-8")  # noqa: SIM115
        self.stderr = open(stderr, encoding="utf-8")  # noqa: SIM115
        self._status = open(status, encoding="ascii")  # noqa: SIM115
        request = json.dumps({"argv": self.args, "cwd": str(cwd), "env": env}).encode()
        with _asking:
            server = _server(env)
            socket.send_fds(server, [len(request).to_bytes(8, "big")], [out, err, told])
            server.sendall(request)
        for descriptor in (out, err, told):
            os.close(descriptor)
        self.pid = int(self._status.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read stdout and stderr, beside each other, until all who hold their other ends are gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        read = {}
        readers = [
            threading.Thread(target=lambda file=file: read.update({file: file.read()}), daemon=True)
            for file in (self.stdout, self.stderr)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(deadline and max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(deadline and max(0, deadline - time.monotonic()))
        return read[self.stdout], read[self.stderr]

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stdout.close()
        self.stderr.close()
        self.wait()


def start(module: str, *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Forked:
    """`python -m module arguments` in a folder and an environment (else that of this process)."""
    return Forked(module, arguments, cwd, dict(os.environ) if env is None else env)


def run(
    module: str, *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 300
) -> Done:
    """The same until its end; what takes longer is killed."""
    with start(module, *arguments, cwd=cwd, env=env) as process:
        try:
            out, err = process.communicate(timeout)
        finally:
            process.kill()
    return Done(process.wait(), out, err)


def _server(env: dict[str, str]) -> socket.socket:
    """One whose libraries have read the same variables."""
    read = {name: value for name, value in env.items() if name.startswith(READ_AT_IMPORT) and name != "PYTHONPATH"}
    key = json.dumps(read, sort_keys=True)
    if key not in _servers:
        ours, theirs = socket.socketpair()
        others = {name: value for name, value in os.environ.items() if not name.startswith(READ_AT_IMPORT)}
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        subprocess.Popen(
            command, cwd=ROOT, env={**others, **read}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )  # it ends when this process does
        theirs.close()
        _servers[key] = ours
    return _servers[key]


def _serve(asked: socket.socket) -> dict[str, Any]:
    """Fork a child for every request; returns the request in the child."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the children
    while True:
        size, descriptors, _, _ = socket.recv_fds(asked, 8, 3)
        if not size:
            os._exit(0)
        request = b""
        while len(request) < int.from_bytes(size, "big"):
            request += asked.recv(1 << 20)
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)

    asked.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, told = descriptors
    if child := os.fork():
        os.close(out)
        os.close(err)
        os.write(told, f"{child}\n".encode())
        os.write(told, f"{os.waitpid(child, 0)[1]}\n".encode())
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, number in ((out, 1), (err, 2)):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    return json.loads(request)


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [request["cwd"], *(path for path in paths if path and path not in sys.path[1:])]
    sys.argv = list(request["argv"])
    runpy.run_module(request["argv"][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
