"""The walk through folders of data: links once, hidden names never, and what was left out is said."""

import json
import os

import pytest

from elara.collect.config import PromptsConfig
from elara.collect.prompts import read_prompts
from elara.data import DataConfig, prepare
from elara.data.files import walk
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig


def names(folder, **options):
    found = walk(folder, **options)
    return [file.relative_to(folder).as_posix() for file in found.files]


@pytest.fixture
def tree(tmp_path):
    """a.txt, part/b.txt, part/deep/c.txt."""
    top = tmp_path / "top"
    (top / "part" / "deep").mkdir(parents=True)
    for name in ("a.txt", "part/b.txt", "part/deep/c.txt"):
        (top / name).write_text(name)
    return top


def test_links_are_followed_once_and_not_in_circles(tree, tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "d.txt").write_text("d")
    for link, target in (
        ("alias", tree / "part"), ("again", tmp_path / "else"), ("more", tmp_path / "else"), ("part/deep/up", tree),
        ("self", tree / "self"), ("0.txt", tree / "a.txt"), ("e.txt", tmp_path / "else" / "d.txt"),
    ):  # fmt: skip
        (tree / link).symlink_to(target)
    assert names(tree) == ["a.txt", "again/d.txt", "part/b.txt", "part/deep/c.txt"]
    found = walk(tree)
    assert {path.relative_to(tree).as_posix() for path in found.repeated} == {
        "alias", "more", "part/deep/up", "0.txt", "e.txt"}  # fmt: skip
    assert [path.name for path in found.broken] == ["self"]
    assert names(tmp_path / "top" / "again") == ["d.txt"]  # a link is a folder like any other


def test_hidden_names_are_left_out_at_every_level_and_counted(tree, capsys):
    for name in (".git/objects/x", ".git/config", "part/.ipynb_checkpoints/b.txt", "part/deep/._c.txt", ".DS_Store"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("not this")
    (tree / "notes.md").write_text("nor this")
    found = walk(tree, lambda file: file.suffix == ".txt")
    assert [file.name for file in found.files] == ["a.txt", "b.txt", "c.txt"]
    found.note()
    assert capsys.readouterr().err == f"note: 6 files are left out of {tree} (5 hidden, 1 of another kind)\n"
    hidden = tree / ".git"
    assert names(hidden) == ["config", "objects/x"]  # what is asked for by name is not hidden
    walk(hidden).note()
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_read_is_an_error(tree):
    (tree / "part").chmod(0)
    try:
        if os.access(tree / "part", os.R_OK):
            pytest.skip("root reads everything")
        with pytest.raises(ElaraError, match=r"cannot read .*part"):
            walk(tree)
    finally:
        (tree / "part").chmod(0o755)


ROWS = [{"id": f"s{i}", "text": f"Document {i} of a bee.", "messages": None} for i in range(40)]
ANSWER = {"role": "assistant", "content": "x"}
TALK = [{"id": f"s{i}", "messages": [{"role": "user", "content": f"What is {i}?"}, ANSWER]} for i in range(40)]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub", "chat", "honeycomb"])
def test_every_source_reads_linked_folders_once_and_nothing_hidden(source, tmp_path, capsys):
    """The same documents in a plain folder, and in one that is put together of links beside an editor's copies."""
    plain, real, linked = tmp_path / "plain", tmp_path / "real", tmp_path / "linked"
    for folder in (plain, real, linked / ".ipynb_checkpoints"):
        folder.mkdir(parents=True)
    for number in range(4):
        rows = (TALK if source == "chat" else ROWS)[number * 10 : number * 10 + 10]
        for folder in (plain, real):
            _write(folder / f"{number}", source, rows)
    _write(linked / ".ipynb_checkpoints" / "0", source, TALK if source == "chat" else ROWS)
    for link in ("part", "same"):
        (linked / link).symlink_to(real)
    counts = []
    for folder in (plain, linked):
        data = DataConfig(name=source, source=source, path=str(folder), val_fraction=0.25)
        made = prepare(data, TokenizerConfig("byte"), tmp_path / "data").manifest
        counts.append([made["train"][key] + made["val"][key] for key in ("documents", "characters")])
        note = capsys.readouterr().err
        assert ("left out" in note) == (folder == linked)
    assert counts[0] == counts[1]
    assert f"note: 5 files are left out of {linked} (1 hidden, 4 linked twice)" in note


def test_prompts_come_from_linked_folders_and_from_nothing_hidden(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "asked" / ".old").mkdir(parents=True)
    _write(tmp_path / "real" / "a", "chat", TALK[:5])
    _write(tmp_path / "asked" / ".old" / "a", "chat", TALK[5:])
    (tmp_path / "asked" / "link").symlink_to(tmp_path / "real")
    asked = read_prompts(PromptsConfig(path=str(tmp_path / "asked")), None, tmp_path)
    assert len(asked.prompts) == 5
    assert "1 file is left out" in capsys.readouterr().err


def _write(file, source, rows):
    if source == "text":
        file.with_suffix(".txt").write_text("\n".join(row["text"] for row in rows))
    elif source in ("parquet", "hub"):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": [row["text"] for row in rows]}), file.with_suffix(".parquet"))
    else:
        file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
