"""The store: whole lines, each once, also from many threads, behind a torn end and on a full disk."""

import json
import math
import shutil
import subprocess
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.backends import Answer, Params, TokenChoice
from elara.collect.prompts import Prompt
from elara.collect.store import Store, answer_id, answer_sample
from elara.errors import ElaraError

IDENTITY = {"kind": "test", "model": "bee"}
PARAMS = Params(temperature=0)


def sample(question="one?", answer="two", **changed):
    given: dict[str, Any] = {"name": "bee", "identity": IDENTITY, "params": PARAMS, "weight": 1.0} | changed
    return answer_sample(Prompt.of([{"role": "user", "content": question}]), Answer(answer, "stop"), **given)


def rows(store):
    return [found for _, found in store.samples()]


def test_prompt_teacher_and_sampling_make_the_key(tmp_path):
    different = [
        sample(),
        sample("two?"),
        sample(identity={**IDENTITY, "revision": "2"}),
        sample(params=Params(temperature=0, seed=1)),
        sample(params=Params(temperature=0, stop=("x",))),
    ]
    with Store(tmp_path) as store:
        assert all(store.append(each) for each in different)
        again = [sample(), sample(answer="three"), sample(name="wasp", weight=2.0)]
        assert not any(store.append(each) for each in again)
        assert rows(store) == different
        assert len(store) == 5
    with Store(tmp_path) as store:
        assert not store.append(sample())
        assert answer_id(Prompt.of([{"role": "user", "content": "one?"}]), "other", PARAMS) not in store
        assert sample().id in store


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4), st.integers(0, 400))
def test_cut_anywhere_the_whole_lines_are_there(tmp_path_factory, answers, cut):
    folder = tmp_path_factory.mktemp("store")
    with Store(folder) as store:
        for i, text in enumerate(answers):
            store.append(sample(f"{i}?", text))
    file = folder / "answers.jsonl"
    content = file.read_bytes()
    kept = content[: max(0, len(content) - cut)]
    file.write_bytes(kept)
    whole = kept.count(b"\n")
    with Store(folder) as store:
        assert store.cut == len(kept) - (kept.rfind(b"\n") + 1)
        assert [row.messages[-1]["content"] for row in rows(store)] == answers[:whole]
        for i, text in enumerate(answers):
            assert store.append(sample(f"{i}?", text)) == (i >= whole)
        assert sorted(row.messages[-1]["content"] for row in rows(store)) == sorted(answers)


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path):
    with Store(tmp_path) as store:
        store.append(sample())
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "' + b"x" * 300_000)
    with Store(tmp_path) as store:
        assert store.cut == 300_008
        assert len(rows(store)) == 1


def test_many_threads_write_whole_lines_each_once(tmp_path):
    with Store(tmp_path) as store:
        added: list[bool] = []

        def work():
            added.extend(store.append(sample(f"{i}?", "y" * 5000)) for i in range(40))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
            store.sync()
        for thread in threads:
            thread.join()
        assert sum(added) == 40
        assert sorted(row.messages[0]["content"] for row in rows(store)) == sorted(f"{i}?" for i in range(40))
        for offset, found in store.samples():
            assert store.at(offset) == found


def test_one_process_holds_a_store_and_a_closed_one_takes_nothing(tmp_path):
    with Store(tmp_path) as store, pytest.raises(ElaraError, match="another process collects in"):
        Store(tmp_path)
    assert not store.append(sample())
    with Store(tmp_path) as store:
        assert len(store) == 0


def test_a_failed_opening_lets_go(tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    for _ in range(2):
        with pytest.raises(ElaraError, match=r"answers\.jsonl, line 1 is not a sample"):
            Store(tmp_path)


def test_logprobs_are_json_whatever_they_are(tmp_path):
    tokens = (TokenChoice("a", -0.123456789, (("a", -0.1), ("b", -math.inf))),)
    prompt = Prompt.of([{"role": "user", "content": "?"}])
    found = answer_sample(prompt, Answer("a", "length", tokens), "bee", IDENTITY, Params(logprobs=2), 1.0)
    with Store(tmp_path) as store:
        store.append(found)
    row = json.loads((tmp_path / "answers.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["provenance"]["logprobs"] == [["a", -0.12346, [["a", -0.1], ["b", None]]]]
    assert row["provenance"]["finish"] == "length"


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        with Store(folder) as store:
            with pytest.raises(OSError, match="No space left") as caught:
                all(store.append(sample(f"{i}?", "x" * 3000)) for i in range(100))
            assert caught.value.filename == str(store.file)
            number = len(store)
            assert 10 < len(rows(store)) == number < 30
        with Store(folder) as store:
            assert (store.cut, len(store)) == (0, number)
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)
