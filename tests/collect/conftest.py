"""A server with OpenAI's API that answers as a test says and counts its questions; the command in a home of its own."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from elara.collect.__main__ import main
from tests import forks

Reply = str | bytes | int  # an answer's text, bytes that are none, or the status of a refusal


class Oracle:
    """Real HTTP on a port of its own. asked: how often each last message came; busy: when each was being answered."""

    def __init__(self, reply: Callable[[str], Reply], delay: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        self.busy: list[tuple[float, float]] = []
        self.delay = delay
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._json(200, {"object": "list", "data": [{"id": "oracle", "object": "model"}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = asked["messages"][-1]["content"]
                with lock:
                    here.asked[question] += 1
                began = time.monotonic()
                time.sleep(here.delay)
                said = reply(question)
                here.busy.append((began, time.monotonic()))
                if isinstance(said, int):
                    self._json(said, {"error": {"message": "no", "type": "test", "code": None, "param": None}})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                if isinstance(said, bytes):
                    self._write(said + b"\n\n")
                    self.close_connection = True
                    return
                top = asked.get("top_logprobs", 0) if asked.get("logprobs") else None
                words = [w if i == 0 else f" {w}" for i, w in enumerate(said.split(" "))]
                for i, word in enumerate(words):
                    self._event(word, None, top, role=i == 0)
                self._event("", "stop", None)
                self._write(b"data: [DONE]\n\n")
                self.close_connection = True

            def _event(self, text: str, finish: str | None, top: int | None, role: bool = False) -> None:
                choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
                if role:
                    choice["delta"]["role"] = "assistant"
                if top is not None:
                    raw = list(text.encode())
                    others = [{"token": "?", "logprob": -3.0, "bytes": [63]}] * top
                    choice["logprobs"] = {
                        "content": [{"token": text, "logprob": -0.5, "bytes": raw, "top_logprobs": others}]
                    }
                event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "oracle",
                         "choices": [choice]}  # fmt: skip
                self._write(f"data: {json.dumps(event)}\n\n".encode())

            def _json(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self._write(body)

            def _write(self, body: bytes) -> None:
                try:
                    self.wfile.write(body)
                    self.wfile.flush()
                except OSError:  # the one who asked was killed
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        here = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def oracle() -> Iterator[Callable[..., Oracle]]:
    """Starts servers: oracle(reply, delay)."""
    made: list[Oracle] = []

    def start(reply: Callable[[str], Reply] = lambda q: f"The answer to {q}", delay: float = 0.0) -> Oracle:
        made.append(Oracle(reply, delay))
        return made[-1]

    yield start
    for server in made:
        server.close()


class Collector:
    """The command in this process, in a home of its own."""

    def __init__(self, home: Path, call: Callable[..., tuple[int, str, str]]) -> None:
        self.home, self._call = home, call

    def __call__(self, *overrides: str) -> tuple[int, str, str]:
        return self._call(main, self.home, *self._own, *overrides)

    @property
    def _own(self) -> list[str]:
        folder = self.home / "conf"
        return ["--config-dir", str(folder)] if folder.is_dir() else []

    def teachers(
        self, weights: dict[str, float] | None = None, /, *, settings: Any = MappingProxyType({}), **servers: Oracle
    ) -> str:
        """Options of the group `teacher` in a folder of one's own; returns the override that names them."""
        folder = self.home / "conf" / "teacher"
        folder.mkdir(parents=True, exist_ok=True)
        for name, server in servers.items():
            backend = {
                "_target_": "elara.backends.openai_compatible.OpenAICompatible",
                "model": "oracle", "base_url": server.url, "retries": 1, "retry_delay": 0.01, **settings,
            }  # fmt: skip
            option = {"weight": (weights or {}).get(name, 1.0), "backend": backend}
            (folder / f"{name}.yaml").write_text(f"# @package teachers.{name}\n{json.dumps(option)}\n")
        return f"teacher=[{','.join(servers)}]"

    def ask(self, prompts: list[str], name: str = "prompts.txt") -> str:
        """Write a file of prompts; returns the override that names it."""
        (self.home / name).write_text("".join(f"{prompt}\n" for prompt in prompts), "utf-8")
        return f"prompts.path={name}"

    def start(self, *overrides: str) -> forks.Forked:
        """The same as a process."""
        return forks.start("elara.collect", *self._own, *overrides, cwd=self.home, env=environment(self.home))

    def rows(self, file: str = "answers.jsonl", name: str = "teachers") -> list[dict[str, Any]]:
        lines = (self.home / "data" / "collected" / name / file).read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


def environment(home: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    kept = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    return {**kept, "ELARA_HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def collector(tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]) -> Collector:
    return Collector(tmp_path, in_process)
