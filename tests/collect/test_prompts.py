"""Prompts from samples, text files and corpora: the same ids everywhere, each once, and a draw that grows."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.collect.config import PromptsConfig
from elara.collect.prompts import Prompt, passages, read_prompts
from elara.data import DataConfig
from elara.data.samples import Sample, write_parquet
from elara.data.sources import open_source
from elara.errors import ElaraError


def read(root, data=None, **wanted):
    return read_prompts(PromptsConfig(**wanted), data, root)


def contents(found):
    return sorted(prompt.messages[-1]["content"] for prompt in found.prompts)


def turn(role, content):
    return {"role": role, "content": content}


def samples():
    return [
        Sample("a", (turn("system", "Be brief."), turn("user", "one?"), turn("assistant", "two"),
                     turn("user", "three?"), turn("assistant", "four"))),
        Sample("b", (turn("user", "one?"),)),
        Sample("c", (turn("user", "one?"), turn("assistant", "another answer"))),
        Sample("d", (turn("assistant", "hello"),)),
        Sample("e", text="a document"),
        Sample("f", (turn("user", "5 in the tool?"), turn("assistant", "<call>"), turn("tool", "5"),
                     turn("assistant", "yes"))),
    ]  # fmt: skip


def test_samples_are_asked_up_to_their_last_answer(tmp_path):
    rows = "".join(json.dumps(sample.row()) + "\n" for sample in samples())
    (tmp_path / "a.jsonl").write_text(rows)
    found = read(tmp_path, path=str(tmp_path / "a.jsonl"))
    asked = {tuple(message["role"] for message in prompt.messages): prompt.messages for prompt in found.prompts}
    assert asked["system", "user", "assistant", "user"][-1]["content"] == "three?"
    assert asked["user", "assistant", "tool"][-1]["content"] == "5"
    assert contents(found) == ["5", "a document", "one?", "three?"]
    assert (found.found, found.repeated, found.unanswerable) == (4, 1, 1)
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "folder" / "a.parquet", samples())
    assert read(tmp_path, path=str(tmp_path / "folder")) == found


def test_ids_depend_on_the_messages_alone(tmp_path):
    (tmp_path / "a.txt").write_text("one?\n")
    (prompt,) = read(tmp_path, path=str(tmp_path / "a.txt")).prompts
    assert prompt == Prompt.of([turn("user", "one?")])
    assert prompt.id == Prompt.of([{"content": "one?", "role": "user"}]).id
    others = [[turn("user", "one")], [turn("system", "one?")], [turn("user", "one?"), turn("user", "")]]
    assert len({prompt.id, *(Prompt.of(other).id for other in others)}) == 4


def test_a_text_file_is_split_into_lines_paragraphs_or_not_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo \n \nthree\n", "utf-8")
    path = str(tmp_path / "a.txt")
    assert contents(read(tmp_path, path=path)) == ["one", "three", "two"]
    assert contents(read(tmp_path, path=path, split="paragraph")) == ["one\ntwo", "three"]
    assert contents(read(tmp_path, path=path, split="file")) == ["one\ntwo \n \nthree"]


def test_template_and_system_message(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(sample.row()) + "\n" for sample in samples()))
    found = read(tmp_path, path=str(tmp_path / "a.jsonl"), template="In the style of: {passage}", system="Be a bee.")
    assert "In the style of: a document" in contents(found)
    systems = [prompt.messages[0]["content"] for prompt in found.prompts]
    assert sorted(systems) == ["Be a bee.", "Be a bee.", "Be a bee.", "Be brief."], "a sample's own one stays"


def test_a_larger_limit_asks_the_same_and_more(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i}?\n" for i in range(50)))
    path = str(tmp_path / "a.txt")
    few, more, every = (read(tmp_path, path=path, limit=limit).prompts for limit in (5, 20, None))
    assert few == more[:5]
    assert more == every[:20]
    assert sorted(p.id for p in every) == sorted({p.id for p in every})
    assert read(tmp_path, path=path, limit=5, seed=1).prompts != few
    first = read(tmp_path, path=path, limit=5, seed=None)
    assert [prompt.messages[0]["content"] for prompt in first.prompts] == [f"{i}?" for i in range(5)]


def test_passages_are_of_the_training_part_and_to_be_continued(tmp_path):
    words = " ".join(f"word{i}" for i in range(2000))
    (tmp_path / "a.txt").write_text(words)
    data = DataConfig(name="text", source="text", path=str(tmp_path / "a.txt"))
    found = read(tmp_path, data, passage=100)
    assert all(prompt.messages[0]["content"].startswith("Continue this text:\n\nword") for prompt in found.prompts)
    assert all(len(prompt.messages[0]["content"]) <= 100 + 21 for prompt in found.prompts)
    assert "word1999" not in "".join(contents(found)), "held out"
    found = read(tmp_path, data, passage=100, template="Ask about {passage}!", limit=3)
    assert all(text.startswith("Ask about word") and text.endswith("!") for text in contents(found))


def test_conversations_of_a_data_set_are_asked_as_they_are(tmp_path):
    rows = [Sample(f"{i}", (turn("user", f"{i}?"), turn("assistant", "yes"))) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(sample.row()) + "\n" for sample in rows))
    data = DataConfig(name="chat", source="chat", path=str(tmp_path / "a.jsonl"), val_fraction=0.2)
    found = read(tmp_path, data)
    held_out = ["".join(pieces) for pieces in open_source(data, tmp_path).documents("val")]
    assert 5 <= len(held_out) <= 40
    assert contents(found) == sorted({f"{i}?" for i in range(100)} - {text.split("\n")[0] for text in held_out})


@settings(deadline=None, max_examples=50)
@given(st.text("ab \n", max_size=400), st.integers(16, 90))
def test_passages_cover_the_text_in_order(tmp_path_factory, text, length):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("word " * 4 + text)
    data = DataConfig(name="text", source="text", path=str(folder / "a.txt"), val_fraction=0.1)
    whole = ("word " * 4 + text)[: int((20 + len(text)) * 0.9)]
    found = list(passages(open_source(data, folder), length))
    assert all(0 < len(passage) <= length and passage in whole for passage in found)
    read, there = ("".join(text.split()) for text in ("".join(found), whole))
    assert there.startswith(read)
    assert len(there) - len(read) < length / 4, "only a rest is left out"


@pytest.mark.parametrize(
    ("content", "message"), [(b"caf\xe9", "is not UTF-8 text (near byte 3)"), (b" \n", "holds nothing to ask")]
)
def test_files_that_cannot_be_asked(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ElaraError) as caught:
        read(tmp_path, path=str(tmp_path / "a.txt"))
    assert message in str(caught.value)


def test_prompts_come_from_one_place(tmp_path):
    for data, path in ((None, None), (DataConfig(), "a.txt")):
        with pytest.raises(ElaraError, match="one place"):
            read(tmp_path, data, path=path)
