"""Tables of documents in OpenWebText's format: local parquet and JSON lines, shards, kills, an absent hub."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elara.data import DataConfig, prepare
from elara.data.sources import table as table_module
from elara.data.sources.table import open_table
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SCRIPT = """
import sys
from pathlib import Path
from elara.data import DataConfig, prepare
from elara.data.sources import table
from elara.tokenizer import TokenizerConfig

if __name__ == "__main__":
    table.PART_TOKENS, table.BATCH = 5000, 8
    data = DataConfig(name="owt", source="hub", path=sys.argv[1], processes=1)
    prepare(data, TokenizerConfig("byte"), Path(sys.argv[2]))
"""


def documents(count, seed=0):
    draw = random.Random(seed)
    return [f"#{seed}-{i} " + "é日👩 lorem " * draw.randrange(20) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """Three shards in OpenWebText's format: parquet with a column `text`."""
    folder = tmp_path / "owt"
    folder.mkdir()
    for shard in range(3):
        columns = pa.table({"text": documents(50 + shard, shard)})
        pq.write_table(columns, folder / f"train-{shard:05d}-of-00003.parquet", row_group_size=7)
    return folder


def run(path, root, kind="byte", **options):
    settings = {"name": "owt", "source": "hub", "path": str(path), "processes": 1, **options}
    return prepare(DataConfig(**settings), TokenizerConfig(kind), root)


def texts(prepared, split):
    tokens = getattr(prepared, split)
    ids = tokens.tokens.tolist()
    assert all(ids[end - 1] == prepared.tokenizer.end_id for end in tokens.ends)
    starts = [0, *tokens.ends[:-1].tolist()]
    return [prepared.tokenizer.decode(ids[a:b]) for a, b in zip(starts, tokens.ends.tolist(), strict=True)]


def test_every_document_comes_once_and_whole_in_one_part(folder, tmp_path):
    prepared = run(folder, tmp_path / "data")
    train, val = texts(prepared, "train"), texts(prepared, "val")
    everything = [text for shard in range(3) for text in documents(50 + shard, shard)]
    assert sorted(train + val) == sorted(everything)
    assert train == [text for text in everything if text in set(train)]  # in the dataset's order
    assert 12 <= len(val) <= 18
    assert prepared.manifest["train"]["characters"] == sum(map(len, train))
    assert list(prepared.manifest["sha256"]) == [str(file) for file in sorted(folder.iterdir())]


def same(one, other):
    for split in ("train", "val"):
        assert getattr(other, split).tokens.tolist() == getattr(one, split).tokens.tolist()
        assert getattr(other, split).ends.tolist() == getattr(one, split).ends.tolist()


def test_parts_change_nothing(folder, tmp_path, monkeypatch):
    one = run(folder, tmp_path / "one")
    monkeypatch.setattr(table_module, "PART_TOKENS", 3000)
    monkeypatch.setattr(table_module, "BATCH", 4)
    same(one, run(folder, tmp_path / "parts"))


@pytest.mark.slow
def test_processes_change_nothing(folder, tmp_path):
    same(run(folder, tmp_path / "one"), run(folder, tmp_path / "two", processes=2))


def test_char_vocabulary_comes_from_all_documents(folder, tmp_path):
    assert set("é日👩lorem #") <= set(run(folder, tmp_path / "data", "char").tokenizer.characters)


@pytest.mark.slow
def test_a_killed_preparation_goes_on_with_its_finished_parts(folder, tmp_path):
    for shard in range(3):
        columns = pa.table({"text": documents(700, shard)})
        pq.write_table(columns, folder / f"train-{shard:05d}-of-00003.parquet", row_group_size=50)
    whole = run(folder, tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parts: list[Path] = []
    for wanted in (5, 25):  # killed twice, the second time in another shard
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and len(parts) < wanted:
            time.sleep(0.005)
            parts = list((tmp_path / "data" / "prepared").glob(".parts-*/shard-*/part-*"))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not list((tmp_path / "data" / "prepared").glob("owt-*"))
    marked = sorted(parts)[2] / "train.bin"  # a finished part is taken as it is, so a mark in it must come out
    marked.write_bytes(b"\x21\x00" * (marked.stat().st_size // 2))
    length = marked.stat().st_size // 2
    subprocess.run(command, env=environment, check=True)
    resumed = run(folder, tmp_path / "data")
    assert (resumed.train.ends == whole.train.ends).all()
    assert (resumed.val.tokens == whole.val.tokens).all()
    different = (resumed.train.tokens != whole.train.tokens).nonzero()[0]
    assert 0 < len(different) <= length
    assert different.max() - different.min() < length
    assert (resumed.train.tokens[different] == 0x21).all()
    assert not list((tmp_path / "data" / "prepared").glob(".parts-*"))


@pytest.mark.parametrize("limit", [1000, 50, 7])
def test_max_documents(folder, tmp_path, limit):
    prepared = run(folder, tmp_path / "data", max_documents=limit, val_fraction=0.5)
    assert len(prepared.train.ends) + len(prepared.val.ends) == min(limit, 153)


def test_json_lines_with_another_column(tmp_path):
    file = tmp_path / "my.jsonl"
    rows = [{"body": text, "id": i} for i, text in enumerate(["", *documents(30)])]
    rows[3]["body"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = run(file, tmp_path / "data", source="jsonl", text_field="body")
    wanted = sorted(row["body"] for row in rows if row["body"])  # empty rows are no documents
    assert sorted(texts(prepared, "train") + texts(prepared, "val")) == wanted
    with pytest.raises(ElaraError, match=r"data.text_field=text is not a column.*body, id"):
        run(file, tmp_path / "data", source="jsonl")
    with pytest.raises(ElaraError, match="column id holds int"):
        run(file, tmp_path / "data", source="jsonl", text_field="id")


def test_changed_rows_are_prepared_anew(folder, tmp_path):
    before = run(folder, tmp_path / "data").folder
    pq.write_table(pa.table({"text": documents(60, 9)}), folder / "train-00000-of-00003.parquet")
    assert run(folder, tmp_path / "data").folder != before


def test_damaged_files_are_refused_in_one_line(folder, tmp_path):
    file = folder / "train-00001-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ElaraError) as error:
        run(folder, tmp_path / "data")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_failing_process_ends_the_preparation_with_its_line(folder, tmp_path):
    pq.write_table(pa.table({"words": ["x"]}), folder / "train-00002-of-00003.parquet")
    with pytest.raises(ElaraError) as error:
        run(folder, tmp_path / "data", processes=2)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_absent_hub_is_one_line_within_seconds(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from elara.data import DataConfig, prepare; from elara.tokenizer import TokenizerConfig\n"
        "from elara.errors import ElaraError\n"
        "data = DataConfig(source='hub', dataset='someone/something')\n"
        "try: prepare(data, TokenizerConfig('byte'), Path(sys.argv[1]))\n"
        "except ElaraError as error: print(error)\n"
    )
    for setting in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        start = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), **setting}
        command = [sys.executable, "-c", script, str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert time.monotonic() - start < 20
        assert result.stdout.startswith("the hub cannot be reached")
        assert result.stdout.count("\n") == 1
        assert "data.path" in result.stdout


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": "hub", "path": None}, "data.dataset"),
        ({"source": "parquet", "path": None}, "data.path"),
        ({"source": "jsonl"}, r"no file that ends in .jsonl"),
        ({"path": "/no/such"}, "does not exist"),
        ({"val_fraction": 0.0}, "data.val_fraction"),
    ],
)
def test_incomplete_settings_name_their_key(folder, tmp_path, options, match):
    with pytest.raises(ElaraError, match=match):
        open_table(DataConfig(**{"source": "parquet", "path": str(folder), **options}), tmp_path)


def test_a_missing_extra_names_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for data in (DataConfig(source="hub", path=str(folder)), DataConfig(source="hub", dataset="someone/something")):
        with pytest.raises(ElaraError, match=r"pip install 'elara-hivemind\[hub\]'"):
            prepare(data, TokenizerConfig("byte"), tmp_path / "data")


def test_files_may_differ_in_columns_that_are_not_read_and_shards_be_empty(tmp_path):
    rows, folder = documents(60), tmp_path / "shards"
    folder.mkdir()
    pq.write_table(pa.table({"text": rows[:20], "n": list(range(20))}), folder / "a.parquet")
    pq.write_table(pa.table({"extra": rows[:20], "text": rows[20:40]}), folder / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "c.parquet")
    pq.write_table(pa.table({"text": pa.array(rows[40:], pa.large_string())}), folder / "d[1].parquet")
    prepared = run(folder, tmp_path / "data", source="parquet")
    assert sorted(texts(prepared, "train") + texts(prepared, "val")) == sorted(rows)
    lines = tmp_path / "lines"
    lines.mkdir()
    for name, part, more in (("a", rows[:30], 1), ("b", rows[30:], "one"), ("c", [], None)):
        made = [json.dumps({"text": text, name: more, "x": more}) + "\n" for text in part]
        (lines / f"{name}.jsonl").write_text("".join(made))
    prepared = run(lines, tmp_path / "data", source="jsonl")
    assert sorted(texts(prepared, "train") + texts(prepared, "val")) == sorted(rows)


def test_messages_name_the_file(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    pq.write_table(pa.table({"text": documents(20)}), folder / "a.parquet")
    for name, table, message in (
        ("b", pa.table({"words": ["x"]}), "data.text_field=text is not a column of .*b.parquet; it has words"),
        ("c", pa.table({"text": ["x", "y"], "n": [1, 2]}), None),
        ("d", pa.table({"text": [1, 2]}), "row 1 of .*d.parquet: column text holds int, not text"),
    ):
        pq.write_table(table, folder / f"{name}.parquet")
        if message is not None:
            with pytest.raises(ElaraError, match=message):
                run(folder, tmp_path / "data", source="parquet")
            (folder / f"{name}.parquet").unlink()
    (folder / "e.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ElaraError, match=r"cannot read .*e\.parquet") as error:
        run(folder, tmp_path / "data", source="parquet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": "He said hi \\ud83d and left."}\n', r"line 1 has half a character \(\\ud83d"),
        ("a.jsonl", '["a"]\n', "line 1 is no JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.json", '{\n"text": "a"\n}', r"a\.json, line 1 is not JSON"),
        ("a.jsonl.gz", '{"text": "a"}\n', r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"cannot read .*a\.jsonl"),
    ],
)
def test_bad_json_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ElaraError, match=message) as error:
        run(tmp_path / name, tmp_path / "data", source="jsonl")
    assert "\n" not in str(error.value)


def test_json_files_of_all_kinds_hold_the_same(tmp_path):
    rows = [{"text": text} for text in documents(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (
        ("a.jsonl", lines.encode()), ("b.json", json.dumps(rows, indent=1).encode()),
        ("c.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        ("d.jsonl.gz", gzip.compress(lines.encode())), ("e.json", lines.replace("\n", "\n\n").encode()),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        prepared = run(tmp_path / name, tmp_path / "data", source="jsonl")
        assert sorted(texts(prepared, "train") + texts(prepared, "val")) == sorted(row["text"] for row in rows), name
