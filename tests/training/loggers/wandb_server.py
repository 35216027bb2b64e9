"""A stand-in for wandb's server, which no test can reach: the four calls by which the real client makes and fills runs.

History lies where the real one has it: a client says at which line of the run its rows belong, and what is there
already it is told when it resumes.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """runs: by id, with name, group, tags, config, history, summary and exit code."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.knows_the_key = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """A GraphQL call; None for one that is not known here."""
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        if name == "RunResumeStatus":
            run = self.runs.get(given["name"])
            return {"model": {**project, "bucket": run and self._status(given["name"], run)}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(given["name"], {"config": "{}", "history": [], "summary": "{}", "exit": None})
            run |= {key: value for key, value in given.items() if value is not None}
            bucket = {**self._status(given["name"], run), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name.startswith("Viewer"):
            if not self.knows_the_key:
                return {"viewer": None}
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return None

    def _status(self, identity: str, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"storage-{identity}",
            "name": identity,
            "displayName": run.get("displayName"),
            "description": None,
            "sweepName": None,
            "summaryMetrics": run["summary"],
            "logLineCount": 0,
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
            "eventsTail": "[]",
            "config": run["config"],
            "tags": run.get("tags"),
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, identity: str, sent: dict[str, Any]) -> None:
        """A piece of a run's files: rows of the history, its summary, its end."""
        run = self.runs[identity]
        files = sent.get("files") or {}
        if rows := files.get("wandb-history.jsonl"):
            run["history"][rows["offset"] :] = map(json.loads, rows["content"])
        if summary := files.get("wandb-summary.json"):
            run["summary"] = summary["content"][-1]
        if sent.get("complete"):
            run["exit"] = sent.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/graphql"):
            call = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", call["query"])
            data = self.server.answer(named[1] if named else "", call.get("variables") or {})
            self._send({"data": data} if data else {"data": None, "errors": [{"message": "unknown here"}]})
        elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            self.server.stream(stream[1], json.loads(body))
            self._send({"exitcode": None, "limits": {}})
        else:  # telemetry
            self._send({})

    def do_GET(self) -> None:
        self._send({})

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
