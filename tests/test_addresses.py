"""Credentials in addresses are used, and neither kept nor shown."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from elara import addresses, archives
from elara.data import __main__ as data_command
from elara.errors import ElaraError
from elara.runs import project_root
from tests.conftest import Home

USER, PASSWORD, TOKEN = "bee", "hunter2-secret", "tok-5up3rs3cret"


@pytest.fixture(autouse=True)
def _nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(addresses.WAITING, "{}")


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that gives Shakespeare's archive to who has the password or the token; asks for both."""
    file = archives.fetch(archives.SHAKESPEARE, project_root() / "data" / "archives")
    pair = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = parse_qs(urlsplit(self.path).query).get("token")
            good = self.headers.get("Authorization") == pair and token == [TOKEN]
            self.send_response(200 if good else 401)
            self.end_headers()
            if good:
                self.wfile.write(file.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_port}/archive.whl"
    running.shutdown()
    running.server_close()


def holding(folder: Path, *words: str) -> list[str]:
    """Files below a folder that hold one of the words."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if any(word.encode() in file.read_bytes() for word in words)]


@pytest.mark.slow
def test_a_run_uses_the_credentials_of_its_data_and_keeps_none(home: Home, server: str, tmp_path: Path) -> None:
    own = Home(tmp_path, home.text)
    options = [text for text in home.tiny("name=keeps", "trainer.max_steps=1") if not text.startswith("data.path")]
    url = f"http://{USER}:{PASSWORD}@{server}?token={TOKEN}"
    done = own.call(*options, "data=shakespeare_char", f'data.url="{url}"', "logger=csv")
    assert done.returncode == 0, done.stderr
    run = own.only_run("keeps")
    assert not holding(tmp_path, PASSWORD, TOKEN)
    for file in (run / "config.yaml", run / ".hydra" / "overrides.yaml", run / ".hydra" / "hydra.yaml"):
        assert f"http://{server}" in file.read_text("utf-8")
    assert PASSWORD not in done.stdout + done.stderr and TOKEN not in done.stdout + done.stderr
    os.environ[addresses.WAITING] = "{}"  # another day
    again = own.call(f"resume={run}", "trainer.max_steps=2")
    assert again.returncode == 0, again.stderr
    for file in (tmp_path / "data").rglob("*.whl"):
        file.unlink()
    for manifest in (tmp_path / "data" / "prepared").glob("*/manifest.json"):
        manifest.unlink()  # another machine: the archive has to be fetched anew
    lost = own.call(f"resume={run}", "trainer.max_steps=3")
    assert lost.returncode == 1 and "give the address with its user, password or token" in lost.stderr


def test_credentials_of_a_configuration_file_are_not_kept_either(in_process, server: str, tmp_path: Path) -> None:
    (tmp_path / "own" / "data").mkdir(parents=True)
    url = f"http://{USER}:{PASSWORD}@{server}?token={TOKEN}-old"
    text = f"# @package _global_\ndata:\n  source: shakespeare\n  url: '{url}'\n"
    (tmp_path / "own" / "data" / "mine.yaml").write_text(text)
    where = f"hydra.run.dir={tmp_path / 'out'}"
    options = [f"--config-dir={tmp_path / 'own'}", "data=mine", "tokenizer=char", "hydra.output_subdir=.hydra", where]
    code, out, err = in_process(data_command.main, tmp_path, *options)
    assert code == 1 and f"cannot fetch http://{server} (HTTP Error 401" in err  # what was sent is another test's
    kept = tmp_path / "out" / ".hydra"
    assert f"http://{server}" in (kept / "config.yaml").read_text() and not holding(kept, PASSWORD, TOKEN)
    assert PASSWORD not in out + err


def test_a_refused_address_is_shown_without_credentials(server: str, tmp_path: Path) -> None:
    with pytest.raises(ElaraError) as error:
        archives.fetch(archives.SHAKESPEARE, tmp_path, f"http://{USER}:wrong-one@{server}?token={TOKEN}")
    assert f"http://{server}" in str(error.value) and "wrong-one" not in str(error.value)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("override", "hidden"),
    [
        ("data.url=https://me:pw@host/a.whl", "data.url=https://host/a.whl"),
        ("+data.replay.url='https://host:8/a?key=1,2#x'", "+data.replay.url='https://host:8/a'"),
        ("data.url=https://a/x?k=1,https://b/y?k=2", "data.url=https://a/x,https://b/y"),
        ("data={url: 'https://me@host', share: 0.5}", "data={url: 'https://host', share: 0.5}"),
        ("teachers.ollama.backend.host=me:pw@host:11434", "teachers.ollama.backend.host=host:11434"),
        ("teachers.x.backend.base_url=http://me:p%40w@host/v1", "teachers.x.backend.base_url=http://host/v1"),
    ],
)
def test_overrides_are_bare_and_their_addresses_whole_again(override: str, hidden: str) -> None:
    assert addresses.hide([override, "-m"]) == [hidden, "-m"]
    for shown, given in json.loads(os.environ[addresses.WAITING]).items():
        assert addresses.whole(shown) == given and given in override and shown in hidden


@pytest.mark.parametrize(
    "override",
    ["data.url=/home/me@work/a.whl", "data.url=null", "data.path=https://me:pw@host", "prompts.system='see https://h/?q=1'",
     "teachers.ollama.backend.host=localhost:11434", "name=url", "data.url=C:\\x", "data.url=https://host/a.whl"],
)  # fmt: skip
def test_other_values_stay_as_they_are(override: str) -> None:
    assert addresses.hide([override]) == [override] and os.environ[addresses.WAITING] == "{}"
