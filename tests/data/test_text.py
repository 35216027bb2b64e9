"""The user's own text: a file split by position, a folder split by files."""

import random

import pytest

from elara.data import DataConfig, prepare
from elara.data.sources import text as text_module
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig


def prepared(path, root, kind="byte", **options):
    data = DataConfig(name="text", source="text", path=str(path), **options)
    return prepare(data, TokenizerConfig(kind), root)


def decoded(prepared, split):
    tokens = getattr(prepared, split)
    return prepared.tokenizer.decode(tokens.tokens.tolist())


@pytest.mark.parametrize("length", [20, 99, 100, 101, 12345])
def test_a_file_is_split_90_to_10_by_characters(tmp_path, length):
    text = "".join(random.Random(0).choices("aé日👩 \n", k=length))
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    both = prepared(tmp_path / "my.txt", tmp_path / "data", "char")
    assert decoded(both, "train") == text[: int(length * 0.9)]
    assert decoded(both, "val") == text[int(length * 0.9) :]
    assert len(both.train) + len(both.val) == length  # a cut is no document's end
    assert both.train.ends.tolist() == [len(both.train)]


@pytest.mark.slow
def test_long_files_are_cut_without_changing_tokens(tmp_path, monkeypatch, gpt2_path):
    parts = ["word", "word's", "  ", " ", "\n", "\n\n", "\t", "é", "日本", "👩", "...", "12", "\r\n"]
    text = "".join(random.Random(1).choices(parts, k=20000)) + "x" * 2000
    (tmp_path / "my.txt").write_bytes(text.encode())
    whole = prepared(tmp_path / "my.txt", gpt2_path / "whole", "gpt2", val_fraction=0.5)
    for piece in (1, 7, 100):
        monkeypatch.setattr(text_module, "PIECE", piece)
        pieces = prepared(tmp_path / "my.txt", gpt2_path / f"pieces{piece}", "gpt2", val_fraction=0.5)
        text_read = decoded(pieces, "train") + decoded(pieces, "val")
        assert text_read == text.replace("\r\n", "\n")
        assert pieces.manifest["train"]["characters"] == int(len(text_read) * 0.5)
        if piece == 100:  # long enough for a cut between words
            assert pieces.train.tokens.tolist() == whole.train.tokens.tolist()


def test_line_ends_and_byte_order_mark_are_normalised(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\rthree\n" * 10)
    both = prepared(tmp_path / "my.txt", tmp_path / "data")
    assert decoded(both, "train") + decoded(both, "val") == "one\ntwo\nthree\n" * 10


def test_other_encodings_are_refused_with_the_place(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"caf\xe9 au lait" * 10)
    with pytest.raises(ElaraError, match=r"not UTF-8 text \(near byte 3\)"):
        prepared(tmp_path / "my.txt", tmp_path / "data")


def test_a_folder_holds_out_whole_files(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for i in range(40):
        (folder / ("deep" if i % 2 else "") / f"{i:02}.txt").write_text(f"<{i}>" * (20 + i))
    (folder / ".hidden").write_text("secret")
    both = prepared(folder, tmp_path / "data")
    assert len(both.train.ends) + len(both.val.ends) == 40
    share = len(both.val) / (len(both.train) + len(both.val))
    assert 0.05 < share < 0.15
    train, val = decoded(both, "train"), decoded(both, "val")
    for i in range(40):
        assert (f"<{i}>" * (20 + i) in train) != (f"<{i}>" * (20 + i) in val)
    assert "secret" not in train + val
    for tokens in (both.train, both.val):  # every document ends with the end id, and only there
        is_end = tokens.tokens == both.tokenizer.end_id
        assert (is_end.nonzero()[0] + 1).tolist() == tokens.ends.tolist()


def test_a_folder_of_two_files_holds_out_the_smaller(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a").write_text("long " * 50)
    (folder / "b").write_text("short")
    both = prepared(folder, tmp_path / "data")
    assert decoded(both, "val") == "short"


def test_a_new_file_moves_no_other_between_the_parts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(50):
        (folder / f"{i}.txt").write_text(f"<{i}>" + "x" * 100)
    before = prepared(folder, tmp_path / "data").manifest["held_out"]
    (folder / "new.txt").write_text("x" * 100)
    after = prepared(folder, tmp_path / "data").manifest["held_out"]
    assert len(set(before) - set(after)) <= 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": None}, "data.path"),
        ({"path": "/no/such/file"}, "does not exist"),
        ({"val_fraction": 0.0}, "data.val_fraction"),
        ({"val_fraction": 1.5}, "data.val_fraction"),
        ({"source": "tekst"}, "data.source"),
    ],
)
def test_wrong_settings_name_their_key(tmp_path, options, match):
    (tmp_path / "my.txt").write_text("text" * 10)
    settings = {"name": "text", "source": "text", "path": str(tmp_path / "my.txt"), **options}
    with pytest.raises(ElaraError, match=match) as error:
        prepare(DataConfig(**settings), TokenizerConfig("byte"), tmp_path / "data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "x"])
def test_empty_files_are_refused(tmp_path, content):
    (tmp_path / "my.txt").write_text(content)
    with pytest.raises(ElaraError, match="empty"):
        prepared(tmp_path / "my.txt", tmp_path / "data")
    assert not list((tmp_path / "data" / "prepared").glob("[!.]*"))


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(ElaraError, match="at least two"):
        prepared(tmp_path / "texts", tmp_path / "data")


BOOK = "It was a dark and stormy night.\n" * 600


@pytest.mark.parametrize("small", ["notes\n", "", "x" * 400])
def test_a_nearly_empty_file_is_no_validation(tmp_path, small):
    folder = tmp_path / "books"
    folder.mkdir()
    for i in (1, 2, 3):
        (folder / f"book{i}.txt").write_text(BOOK)
    (folder / "NOTES.txt").write_text(small)
    for root in ("one", "two"):  # the same every time
        both = prepared(folder, tmp_path / root)
        assert decoded(both, "val") == BOOK
        assert sorted(both.manifest["sha256"]) == ["NOTES.txt", "book1.txt", "book2.txt", "book3.txt"]
        assert len(both.train.ends) == 3


def test_two_books_and_a_note_hold_out_a_book(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name, text in (("a.txt", BOOK), ("b.txt", BOOK * 2), ("c.txt", "note"), ("d.txt", "")):
        (folder / name).write_text(text)
    assert decoded(prepared(folder, tmp_path / "data"), "val") == BOOK


@pytest.mark.parametrize("small", ["notes\n", ""])
def test_a_single_book_beside_a_note_is_refused(tmp_path, small):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "book.txt").write_text(BOOK)
    (folder / "NOTES.txt").write_text(small)
    with pytest.raises(ElaraError, match=r"nearly all text is in .*book\.txt.*give this file itself"):
        prepared(folder, tmp_path / "data")
