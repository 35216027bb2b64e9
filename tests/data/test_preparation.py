"""Prepared folders: built once, whole or not at all, anew when source or tokenizer change."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from elara.data import DataConfig, open_prepared, prepare
from elara.data import hashes as hashes_module
from elara.data.sources import text as text_module
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig

SCRIPT = """
import sys
from pathlib import Path
from elara.data import DataConfig, prepare
from elara.tokenizer import TokenizerConfig
print("ready", flush=True)
data = DataConfig(name="text", source="text", path=sys.argv[1])
print(prepare(data, TokenizerConfig("byte"), Path(sys.argv[2])).folder)
"""


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("".join(f"{i} bottles of beer\n" for i in range(1000)))
    return file


def run(corpus, root, kind="byte", **options):
    return prepare(DataConfig(name="text", source="text", path=str(corpus), **options), TokenizerConfig(kind), root)


def start(corpus, root):
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def visible(root):
    return sorted(path.name for path in (root / "prepared").glob("*") if not path.name.startswith("."))


def test_the_manifest_says_what_is_there(corpus, tmp_path):
    prepared = run(corpus, tmp_path / "data")
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest == prepared.manifest
    assert manifest["sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert manifest["path"] == str(corpus)
    assert manifest["tokenizer"]["fingerprint"] == prepared.tokenizer.fingerprint
    for split, tokens in (("train", prepared.train), ("val", prepared.val)):
        assert manifest[split]["tokens"] == len(tokens)
        assert manifest[split]["documents"] == len(tokens.ends) == 1
        assert manifest[split]["characters"] == len(tokens)
        stored = (prepared.folder / f"{split}.bin").read_bytes()
        assert manifest[split]["sha256"] == hashlib.sha256(stored).hexdigest()
        assert stored == tokens.tokens.astype("<u2").tobytes()


def test_a_second_call_builds_nothing(corpus, tmp_path):
    first = run(corpus, tmp_path / "data").folder
    stamp = (first / "train.bin").stat().st_mtime_ns
    assert run(corpus, tmp_path / "data").folder == first
    assert (first / "train.bin").stat().st_mtime_ns == stamp


def test_changed_text_is_prepared_anew_and_the_old_state_removed(corpus, tmp_path):
    before = run(corpus, tmp_path / "data")
    status = corpus.stat()
    corpus.write_text(corpus.read_text().replace("beer", "wine"))
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    after = run(corpus, tmp_path / "data")
    assert after.folder != before.folder
    assert "wine" in after.tokenizer.decode(after.train.tokens.tolist())
    assert visible(tmp_path / "data") == [after.folder.name]
    assert "beer" in before.tokenizer.decode(before.train.tokens.tolist())  # a run that has it open goes on


def test_changed_settings_are_prepared_beside_the_old(corpus, tmp_path):
    folders = {
        run(corpus, tmp_path / "data").folder,
        run(corpus, tmp_path / "data", "char").folder,
        run(corpus, tmp_path / "data", val_fraction=0.2).folder,
    }
    assert visible(tmp_path / "data") == sorted(folder.name for folder in folders)
    assert len(folders) == 3


def test_large_files_are_hashed_once_per_state(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes_module, "LARGE", 100)
    first = run(corpus, tmp_path / "data").folder
    status = corpus.stat()
    corpus.write_text(corpus.read_text().replace("beer", "wine"))
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(corpus, tmp_path / "data").folder == first  # size and time stand for the content
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert run(corpus, tmp_path / "data").folder != first


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.ends"])
def test_truncated_token_files_are_refused(corpus, tmp_path, name):
    folder = run(corpus, tmp_path / "data").folder
    file = folder / name
    file.write_bytes(file.read_bytes()[:-2])
    for action in (lambda: run(corpus, tmp_path / "data"), lambda: open_prepared(folder)):
        with pytest.raises(ElaraError, match=r"instead of \d+: delete"):
            action()
    file.unlink()
    with pytest.raises(ElaraError, match="delete"):
        run(corpus, tmp_path / "data")


def test_an_unreadable_manifest_is_refused(corpus, tmp_path):
    folder = run(corpus, tmp_path / "data").folder
    (folder / "manifest.json").write_text('{"train": ')
    with pytest.raises(ElaraError, match="delete"):
        run(corpus, tmp_path / "data")


def test_another_tokenizer_in_the_folder_is_refused(corpus, tmp_path):
    folder = run(corpus, tmp_path / "data", "char").folder
    run(corpus, tmp_path / "data", "byte").tokenizer.save(folder / "tokenizer")
    with pytest.raises(ElaraError, match="fingerprint"):
        open_prepared(folder)


def test_large_vocabularies_take_uint32(corpus, tmp_path):
    corpus.write_text("".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x1A000)])))
    prepared = run(corpus, tmp_path / "data", "char", val_fraction=0.5)
    assert prepared.train.tokens.dtype == np.uint32
    assert prepared.manifest["dtype"] == "<u4"
    assert prepared.tokenizer.decode(prepared.val.tokens[-2:].tolist()) == "\U00019ffe\U00019fff"


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_behind_that_is_used(tmp_path):
    corpus, root = tmp_path / "my.txt", tmp_path / "data"
    corpus.write_text("All work and no play makes Jack a dull boy.\n" * 1_000_000)  # about a second's work
    kills = 0
    for delay in (0.0, 0.05, 0.2):
        process = start(corpus, root)
        while process.poll() is None and not list((root / "prepared").glob(".build-*/*.bin")):
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert visible(root) == [] or process.returncode == 0
    assert kills
    prepared = run(corpus, root)
    assert len(prepared.train) + len(prepared.val) == corpus.stat().st_size
    assert visible(root) == [prepared.folder.name]
    assert not list((root / "prepared").glob(".build-*"))


def test_processes_at_once_build_one_folder(corpus, tmp_path):
    corpus.write_text(corpus.read_text() * 300)
    processes = [start(corpus, tmp_path / "data") for _ in range(3)]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(folders) == 1
    assert visible(tmp_path / "data") == [os.path.basename(folders.pop())]
    assert not list((tmp_path / "data" / "prepared").glob(".build-*"))
    run(corpus, tmp_path / "data")


@pytest.fixture
def small_letters(tmp_path):
    """A tokenizer.json that knows small letters, space, full stop and line break, and drops all else."""
    hf = pytest.importorskip("tokenizers")
    names = "abcdefghijklmnopqrstuvwxyz .\n"
    backend = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    backend.decoder = hf.decoders.Fuse()
    backend.save(str(tmp_path / "letters.json"))
    return TokenizerConfig("huggingface", path=str(tmp_path / "letters.json"))


KEPT = "the cat sat on a mat.\n"
LOST = "the cat sat on Ψ mat.\n"


@pytest.mark.parametrize(("lines", "where"), [(1000, 22 * 500 + 15), (10, 22 * 9 + 15)])
def test_text_that_the_tokenizer_loses_is_refused_with_its_place(small_letters, tmp_path, monkeypatch, lines, where):
    monkeypatch.setattr(text_module, "PIECE", 100)  # several pieces
    monkeypatch.setattr(text_module, "TAIL", 50)
    file = tmp_path / "mixed.txt"
    file.write_text(KEPT * (where // 22) + LOST + KEPT * (lines - where // 22 - 1), "utf-8")  # in train; in val
    data = DataConfig(name="text", source="text", path=str(file))
    with pytest.raises(ElaraError, match=rf"position {where} of {file}\).*gives back .* for 'Ψ mat") as error:
        prepare(data, small_letters, tmp_path / "data")
    assert "\n" not in str(error.value) and not visible(tmp_path / "data")
    file.write_text(KEPT * lines)
    both = prepare(data, small_letters, tmp_path / "data")
    assert "".join(both.tokenizer.decode(tokens.tokens.tolist()) for tokens in (both.train, both.val)) == KEPT * lines


def test_lost_text_is_named_in_folders_tables_and_conversations(small_letters, tmp_path):
    folder, rows, talk = tmp_path / "texts", tmp_path / "rows.jsonl", tmp_path / "talk.jsonl"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(KEPT * 10 + (LOST if i == 7 else ""), "utf-8")
    lines = [json.dumps({"id": str(i), "text": KEPT if i != 5 else LOST}) for i in range(20)]
    rows.write_text("\n".join(lines))
    asked = {"role": "user", "content": "who is there."}
    samples = [{"id": f"s{i}", "messages": [asked, {"role": "assistant", "content": KEPT if i != 5 else LOST}]}
               for i in range(30)]  # fmt: skip
    talk.write_text("\n".join(map(json.dumps, samples)))
    cases = [("text", folder, f"position 235 of {folder / '7.txt'}")]
    cases.append(("chat", talk, "position 15 of message 2 of sample s5 of "))
    if importlib.util.find_spec("datasets"):
        cases.append(("jsonl", rows, f"position 15 of row 6 of {rows}"))
    for source, path, place in cases:
        with pytest.raises(ElaraError) as error:
            prepare(DataConfig(name="x", source=source, path=str(path)), small_letters, tmp_path / "data")
        assert place in str(error.value)
