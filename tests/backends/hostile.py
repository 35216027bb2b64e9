"""A real HTTP server that speaks the APIs of OpenAI and of Ollama, and does to each request what it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import pytest

from elara.backends.server import Server

Act = Callable[["Handler"], None]


@contextmanager
def closing_backends() -> Iterator[None]:
    """Close every backend that a test made: the clients leave sockets open otherwise."""
    made: list[Server] = []
    build = Server.__init__

    def remember(self: Server, *given: Any) -> None:
        build(self, *given)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "__init__", remember)
        yield
    for backend in made:
        backend.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Handler(BaseHTTPRequestHandler):
    """One request. `api` is openai or ollama, `body` what was asked."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hostile: Hostile
    api: str
    body: Any

    def do_GET(self) -> None:
        self.api = "openai" if self.path.startswith("/v1") else "ollama"
        self.hostile.listing(self)

    def do_POST(self) -> None:
        self.api = "openai" if self.path.startswith("/v1") else "ollama"
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/pull":
            self.hostile.pulls.append(self.body)
            self.hostile.pulling(self)
            return
        with self.hostile.lock:
            self.hostile.asked.append(self.body)
            self.hostile.times.append(time.monotonic())
            act = self.hostile.script[min(len(self.hostile.asked), len(self.hostile.script)) - 1]
            self.hostile.inside += 1
            self.hostile.most = max(self.hostile.most, self.hostile.inside)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                act(self)
        finally:
            with self.hostile.lock:
                self.hostile.inside -= 1

    def head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def whole(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, Content_Length=str(len(data)), Content_Type="application/json", **headers)
        self.wfile.write(data)

    def begin(self) -> None:
        self.head(Transfer_Encoding="chunked", Content_Type="text/event-stream")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def piece(self, text: str = "", finish: str | None = None, thought: str | None = None, tokens: Any = None) -> bytes:
        """One event of a stream."""
        if self.api == "ollama":
            message = {"role": "assistant", "content": text} | ({"thinking": thought} if thought else {})
            event: dict[str, Any] = {"model": "bee", "message": message, "done": finish is not None}
            event |= {"done_reason": finish} if finish else {}
            return json.dumps(event | ({"logprobs": tokens} if tokens else {})).encode() + b"\n"
        delta = {"content": text} | ({"reasoning_content": thought} if thought else {})
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
        choice |= {"logprobs": {"content": tokens}} if tokens else {}
        event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "bee", "choices": [choice]}
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def log_message(self, *_: Any) -> None:
        pass


def speak(*texts: str, finish: str = "stop", thought: str | None = None) -> Act:
    """A good answer."""

    def act(handler: Handler) -> None:
        handler.begin()
        if thought:
            handler.chunk(handler.piece(thought=thought))
        for text in texts:
            handler.chunk(handler.piece(text))
        handler.chunk(handler.piece(finish=finish))
        if handler.api == "openai":
            handler.chunk(b"data: [DONE]\n\n")
        handler.chunk(b"")

    return act


def speak_tokens(*texts: str, alternatives: int | None = None) -> Act:
    """A good answer, with the log-probabilities where they are asked for."""

    def act(handler: Handler) -> None:
        if not handler.body.get("logprobs"):
            return speak(*texts)(handler)
        count = min(handler.body["top_logprobs"], alternatives if alternatives is not None else 100)
        handler.begin()
        for text in texts:
            top = [{"token": text if i == 0 else f"t{i}", "logprob": -0.5 - i, "bytes": None} for i in range(count)]
            token = {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": top}
            handler.chunk(handler.piece(text, tokens=[token]))
        handler.chunk(handler.piece(finish="stop"))
        handler.chunk(b"")
        return None

    return act


def status(code: int, message: str = "no", **headers: str) -> Act:
    def act(handler: Handler) -> None:
        error: Any = message if handler.api == "ollama" else {"message": message, "type": "error", "code": None}
        handler.whole({"error": error}, code, **headers)

    return act


def inside(message: str) -> Act:
    """An error in the middle of a stream."""

    def act(handler: Handler) -> None:
        handler.begin()
        handler.chunk(handler.piece("Once"))
        error = {"error": message if handler.api == "ollama" else {"message": message, "code": 500}}
        handler.chunk((b"" if handler.api == "ollama" else b"data: ") + json.dumps(error).encode() + b"\n\n")
        handler.chunk(b"")

    return act


def silent(handler: Handler) -> None:
    handler.hostile.closing.wait(20)
    handler.hang_up()


def silent_midway(handler: Handler) -> None:
    handler.begin()
    handler.chunk(handler.piece("Once"))
    silent(handler)


def hang_up(handler: Handler) -> None:
    handler.hang_up()


def drop(handler: Handler) -> None:
    """The connection breaks in the middle of a stream."""
    handler.begin()
    handler.chunk(handler.piece("Once upon"))
    handler.hang_up()


def cut(handler: Handler) -> None:
    """The stream ends in good order, but the answer has not."""
    handler.begin()
    handler.chunk(handler.piece("Once upon"))
    handler.chunk(b"")


def endless(handler: Handler) -> None:
    handler.begin()
    while not handler.hostile.closing.is_set():
        handler.chunk(handler.piece("and so on ") * 20)


def endless_line(handler: Handler) -> None:
    handler.begin()
    while not handler.hostile.closing.is_set():
        handler.chunk(b"x" * (1 << 20))


def drip(handler: Handler) -> None:
    """Something always comes, but never a word."""
    handler.begin()
    while not handler.hostile.closing.wait(0.02):
        handler.chunk(b": still here\n\n" if handler.api == "openai" else handler.piece())


def page(handler: Handler) -> None:
    data = b"<html><body>Welcome!</body></html>"
    handler.head(Content_Length=str(len(data)), Content_Type="text/html")
    handler.wfile.write(data)


def raw(*lines: str | bytes) -> Act:
    """A stream of these lines."""

    def act(handler: Handler) -> None:
        handler.begin()
        for line in lines:
            data = line.encode() if isinstance(line, str) else line
            handler.chunk(data + b"\n" if handler.api == "ollama" else b"data: " + data + b"\n\n")
        handler.chunk(b"")

    return act


def not_text(handler: Handler) -> None:
    handler.begin()
    handler.chunk(handler.piece("caf@").replace(b"@", b"\xe9"))
    handler.chunk(handler.piece(finish="stop"))
    handler.chunk(b"")


def split_characters(handler: Handler) -> None:
    """Characters of several bytes, every byte in a chunk of its own; and one that JSON writes as two halves."""
    handler.begin()
    text = handler.piece("na@ve €").replace(b"@", "ï".encode()).replace(b"\\u20ac", "€🐝".encode())
    for byte in text:
        handler.chunk(bytes([byte]))
    handler.chunk(handler.piece(finish="stop"))
    handler.chunk(b"")


def models(*names: str) -> Act:
    def act(handler: Handler) -> None:
        if handler.api == "openai":
            entries = [
                {"id": name, "object": "model", "created": 1, "owned_by": "bees", "meta": {"n": 1}} for name in names
            ]
            handler.whole({"object": "list", "data": entries})
        else:
            entry = {"digest": "abc123", "size": 1, "details": {"family": "bees", "parameter_size": "1B"}}
            handler.whole({"models": [{"model": name, "name": name} | entry for name in names]})

    return act


@dataclass
class Hostile:
    """script: what is done to the first, second, ... request; the last one to all that follow."""

    script: tuple[Act, ...]
    listing: Act = field(default_factory=lambda: models("bee"))
    pulling: Act = page
    asked: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    pulls: list[Any] = field(default_factory=list)
    port: int = 0
    inside: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Listening(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: Any) -> None:
        """Clients hang up here as they please."""

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without looking the host's name up
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]


@contextmanager
def hostile(*script: Act, **more: Any) -> Iterator[Hostile]:
    found = Hostile(script, **more)
    server = Listening(("127.0.0.1", 0), type("Bound", (Handler,), {"hostile": found}))
    found.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
