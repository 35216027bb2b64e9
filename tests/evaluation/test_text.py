"""Held-out text: what data preparation holds out, evenly chosen, the same for every tokenizer."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from elara.data import DataConfig, prepare
from elara.errors import ElaraError
from elara.evaluation.config import EvalConfig
from elara.evaluation.run import evaluate
from elara.evaluation.text import held_out_text
from elara.tokenizer import TokenizerConfig
from elara.tokenizer.huggingface import HuggingFaceTokenizer


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


def test_text_that_a_tokenizer_loses_gives_no_figures_and_the_place_is_named(tmp_path, make_loaded):
    hf = pytest.importorskip("tokenizers")
    names = "abcdefghijklmnopqrstuvwxyz .\n"
    backend = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    backend.decoder = hf.decoders.Fuse()
    loaded = make_loaded(tokenizer=HuggingFaceTokenizer(backend.to_str().encode()))
    lines = [f"the cat sat on a mat. {'λόγος φύσις' if i == 95 else 'and ran'}.\n" for i in range(100)]
    data = file_of(tmp_path, "".join(lines))
    text = held_out_text(data, tmp_path, passage=64)
    wanted = EvalConfig(prompts=0, precisions=["float32"])
    with pytest.raises(ElaraError) as error:
        evaluate(loaded, text, wanted)
    whole = "".join(lines)
    assert f"position {whole.index('λ')} of {data.path} of the held-out part of mine" in str(error.value)
    assert "gives back" in str(error.value) and "\n" not in str(error.value)
    kept = held_out_text(file_of(tmp_path, whole.replace("λόγος φύσις", "mat")), tmp_path, passage=64)
    loss = evaluate(loaded, kept, wanted).loss
    assert loss is not None and loss.bytes == kept.bytes


def test_passages_that_begin_within_a_text_keep_their_first_space(tmp_path, make_loaded):
    """A tokenizer of SentencePiece's kind writes a space before every text, and takes one that is there for it."""
    hf = pytest.importorskip("tokenizers")
    names = [*"abcdefghijklmnopqrstuvwxyz▁.\n"]
    backend = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = hf.decoders.Sequence([hf.decoders.Metaspace(prepend_scheme="always", split=False)])
    tokenizer = HuggingFaceTokenizer(backend.to_str().encode())
    text = held_out_text(file_of(tmp_path, "the cat sat\n" * 100), tmp_path, passage=7)
    spaced = [i for i, passage in enumerate(text.passages) if passage.startswith(" ")]
    anchor = tokenizer.encode("a")
    assert spaced
    for i in spaced:
        assert tokenizer.decode([*anchor, *text.encode(i, tokenizer)]) == "a" + text.passages[i]
    wanted = EvalConfig(prompts=2, new_tokens=1, speed_rounds=0, precisions=["float32"])
    evaluate(make_loaded(tokenizer=tokenizer), text, wanted)
