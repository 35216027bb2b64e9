"""Samples keep what they were given, in JSON lines and in Parquet, and say where a file is wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.data.samples import Sample, read_samples, write_parquet
from elara.errors import ElaraError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS}),
    max_size=3,
)
SAMPLES = st.lists(
    st.builds(
        lambda name, content, source, weight, note: Sample(
            name,
            messages=tuple(content) if isinstance(content, list) else None,
            text=content if isinstance(content, str) else None,
            source=source,
            weight=weight,
            provenance=note,
        ),
        TEXTS, TEXTS | MESSAGES, st.sampled_from(["document", "teacher"]), st.floats(0, 1e6),
        st.dictionaries(TEXTS, TEXTS | st.integers(-9, 9) | st.none(), max_size=2),
    ),
    max_size=5,
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(SAMPLES)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> None:
    folder = tmp_path_factory.mktemp("samples")
    lines = "".join(json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in samples)
    (folder / "a.jsonl").write_text(lines, "utf-8", newline="\n")
    assert list(read_samples(folder / "a.jsonl")) == samples
    assert write_parquet(folder / "b.parquet", samples, rows=2) == len(samples)
    assert list(read_samples(folder / "b.parquet")) == samples
    assert list(read_samples(folder)) == samples * 2


GOOD = '{"id": "a", "text": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "{", "line 2 is not JSON"),
        (GOOD + '"a"', "line 2 is not a sample"),
        ('{"id": "a"}', "line 1 is not a sample: a JSON object with messages, conversations or text is needed"),
        ('{"id": "a", "text": null}', "line 1: sample a needs either messages or text"),
        ('{"id": [1], "text": "b"}', "line 1: an id is list: give a text or a number, or leave it out"),
        ('{"id": "a", "text": "b", "messages": []}', "needs either messages or text"),
        ('{"id": "a", "messages": [{"role": "bee", "content": "b"}]}', "sample a has a message of role 'bee': roles"),
        ('{"id": "a", "messages": [{"content": "b"}]}', "sample a has a message of role None"),
        ('{"id": "a", "messages": [{"role": "user"}]}', "sample a has a message of role user whose content is no "),
        ('{"conversations": "hello"}', "line 1: conversations are str, not a list of messages"),
        ('{"conversations": [{"from": "bee", "value": "b"}]}', "has a message of role 'bee'"),
        ('{"conversations": [{"from": "function_call", "value": "now"}]}', "from function_call is no JSON: now"),
        ('{"id": "a", "messages": ["hello"]}', "line 1: "),
        ('{"id": "a", "text": "b", "weight": -1}', "weight -1.0"),
        ('{"id": "a", "text": "b", "weight": NaN}', "weight nan"),
        ('{"id": "a", "text": "b", "weight": "much"}', "line 1: weight 'much' is no number"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content, "utf-8")
    with pytest.raises(ElaraError, match=r"a\.jsonl") as error:
        list(read_samples(tmp_path / "a.jsonl"))
    assert message in str(error.value)


TALK = [("system", "Be kind."), ("user", "hi"), ("assistant", "Hello!")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": role, "content": text} for role, text in TALK]},
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TALK], "id": 7},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "hi"},
                           {"from": "gpt", "value": "Hello!"}]},
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"conversation": [{"role": role, "content": text} for role, text in TALK], "id": None},
    ],
)  # fmt: skip
def test_conversations_as_people_have_them(tmp_path: Path, row: dict) -> None:
    """OpenAI's form, in parts as well, and ShareGPT's, without an id or with a number."""
    lines = [json.dumps(row), json.dumps({**row, "id": "b"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    first, second = read_samples(tmp_path / "a.jsonl")
    assert [(message["role"], message["content"]) for message in first.messages or ()] == TALK
    assert second == Sample("b", first.messages) and first.unread == ()
    assert first.id == ("7" if row.get("id") else next(read_samples(tmp_path / "a.jsonl")).id) != "b"


def test_what_a_function_is_asked_and_says_in_sharegpts_form(tmp_path: Path) -> None:
    call = {"name": "now", "arguments": {}}
    said = [("human", "what time?"), ("function_call", json.dumps(call)), ("observation", "noon"), ("gpt", "Noon.")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in said]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), "utf-8")
    (sample,) = read_samples(tmp_path / "a.jsonl")
    assert [(message["role"], message["content"]) for message in sample.messages or ()] == [
        ("user", "what time?"), ("assistant", f"<tool_call>{json.dumps(call)}</tool_call>"), ("tool", "noon"),
        ("assistant", "Noon."),
    ]  # fmt: skip


def test_bad_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.txt", "must end in"), ("b.jsonl", "cannot read"), ("c.parquet", "cannot read"), ("empty", "no samples"),
        ("none", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(ElaraError, match=message):
            list(read_samples(tmp_path / name))
