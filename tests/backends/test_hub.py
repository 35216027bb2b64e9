"""Models by their name on the hub: a server here that speaks its protocol, and none at all."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

from elara.backends import BackendError
from elara.backends.transformers import Transformers

hub = pytest.importorskip("huggingface_hub")
COMMIT = "c" * 40
IDS = torch.tensor([[7, 8, 9]])


class Hub(BaseHTTPRequestHandler):
    """One repository, bees/tiny, whose files lie in `folder`; every request is noted in `asked`."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        files = list(self.folder.iterdir())
        if re.fullmatch(f"/api/models/bees/tiny(/revision/(v1|{COMMIT}))?", path):
            names = [{"rfilename": file.name} for file in files]
            self.send(json.dumps({"id": "bees/tiny", "sha": COMMIT, "siblings": names}).encode(), "application/json")
        elif path.startswith("/api/models/bees/tiny/tree/"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "a" * 40} for f in files]
            self.send(json.dumps(tree).encode(), "application/json")
        elif path.startswith(f"/bees/tiny/resolve/{COMMIT}/"):
            self.send((self.folder / path.rpartition("/")[2]).read_bytes(), "application/octet-stream")
        else:
            self.send(b'{"error": "Repository not found"}', "application/json", 404)

    def send(self, body: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path / "hub"), raising=False)


@pytest.fixture
def server(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    folder = tmp_path / "served"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (folder / "modeling.py").write_text("raise SystemExit")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
        template = here + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield handler
        running.shutdown()


def test_a_model_is_fetched_once_and_known_by_its_commit(
    server: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = Transformers(str(llama), device="cpu", dtype="float32").top_logprobs(IDS, 4)
    first = Transformers("bees/tiny", device="cpu", dtype="float32", revision="v1")
    assert torch.equal(first.top_logprobs(IDS, 4).logprobs, want.logprobs)
    said = {"kind": "transformers", "model": "bees/tiny", "revision": COMMIT}
    assert first.identity() == {**said, "dtype": "float32", "end_token": None}
    got = {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}
    assert "model.safetensors" in got
    assert not got & {"pytorch_model.bin", "modeling.py"}
    assert first.fingerprint == Transformers(str(llama)).fingerprint

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the hub is gone
    later = Transformers("bees/tiny", device="cpu", dtype="float32", revision="v1")
    assert torch.equal(later.top_logprobs(IDS, 4).logprobs, want.logprobs)
    assert later.identity() == first.identity()


def test_a_name_that_the_hub_does_not_know_is_refused(server: Any) -> None:
    with pytest.raises(BackendError, match="the hub refuses bees/none") as error:
        Transformers("bees/none").embed(["x"])
    assert error.value.kind == "refused"
    assert "\n" not in str(error.value)


def test_a_hub_out_of_reach_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = monotonic()
    with pytest.raises(BackendError, match="hub cannot be reached") as error:
        Transformers("nobody/nothing").embed(["x"])
    assert monotonic() - start < 60
    assert error.value.kind == "unreachable"
    assert "\n" not in str(error.value)
