"""Held-out text: what data preparation holds out, evenly chosen, the same for every tokenizer."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from elara.data import DataConfig, prepare
from elara.errors import ElaraError
from elara.evaluation import held_out_text
from elara.tokenizer import TokenizerConfig


def file_of(tmp_path, text):
    path = tmp_path / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    return DataConfig(name="mine", source="text", path=str(path))


def test_all_of_it_is_what_preparation_holds_out(tmp_path):
    data = file_of(tmp_path, "".join(f"line {i} of möre\n" for i in range(500)))
    prepared = prepare(data, TokenizerConfig("byte"), tmp_path)
    text = held_out_text(data, tmp_path, passage=100)
    assert "".join(text.passages) == prepared.tokenizer.decode(prepared.val.tokens.tolist())
    assert {len(passage) for passage in text.passages[:-1]} == {100}
    assert text.bytes == len(prepared.val)
    assert text.documents == 1


def test_the_rows_of_a_table_are_those_that_preparation_holds_out(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"document {i}" if i % 7 else ""} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(name="rows", source="jsonl", path=str(tmp_path / "rows.jsonl"), max_documents=90)
    prepared = prepare(data, TokenizerConfig("byte"), tmp_path)
    ends = [0, *prepared.val.ends.tolist()]
    wanted = [prepared.tokenizer.decode(prepared.val.tokens[a:b].tolist()) for a, b in pairwise(ends)]
    assert held_out_text(data, tmp_path).passages == wanted


def test_a_limit_takes_passages_from_everywhere(tmp_path):
    data = file_of(tmp_path, "".join(f"{i:06d}\n" for i in range(10_000)))  # the last 1000 lines are held out
    text = held_out_text(data, tmp_path, max_bytes=700, passage=70)
    places = [int(passage[:6]) for passage in text.passages]
    assert places == list(range(9000, 10_000, 100))
    assert text.bytes == 700
    assert held_out_text(data, tmp_path, max_bytes=50, passage=7000).passages[0] == "".join(
        f"{i:06d}\n" for i in range(9000, 9008)
    )[:50]


def test_a_large_corpus_is_not_read_to_its_end(tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03d}.txt").write_text(f"{i:03d} " * 250)
    data = DataConfig(name="many", source="text", path=str(folder), val_fraction=0.9)
    text = held_out_text(data, tmp_path, max_bytes=1000, passage=500)
    assert text.documents == 16
    assert len({passage[:3] for passage in text.passages}) == len(text.passages) == 2


def test_no_text_is_said(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").touch()
    with pytest.raises(ElaraError, match="held-out part of data=mine is empty"):
        held_out_text(DataConfig(name="mine", source="text", path=str(folder)), tmp_path)
