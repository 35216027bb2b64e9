"""Conversations as data: what is learned of them, how they are split, packed and refused."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

from elara.data import DataConfig, prepare
from elara.data.config import ReplayConfig
from elara.data.module import ElaraData
from elara.data.samples import Sample, prompt_id
from elara.data.sources import open_source
from elara.data.sources.base import SPLITS
from elara.data.sources.samples import Chat, open_samples
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig
from elara.tokenizer.calls import parse_call

BYTES = TokenizerConfig("byte")


def talk(i, answer="yes", weight=1.0):
    messages = [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": answer}]
    return Sample(f"s{i}", tuple(messages), weight=weight)


@pytest.fixture
def write(tmp_path):
    """Writes samples (or plain lines) and gives the configuration that reads them."""

    def write(rows, name="chat.jsonl", **options):
        file = tmp_path / "samples" / name
        file.parent.mkdir(exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row.row()) for row in rows]
        file.write_text("\n".join(lines) + "\n")
        given = {"name": "chat", "source": "chat", "path": str(file), "val_fraction": 0.2, "batch_size": 2,
                 "cross_documents": False, "pack": True, **options}  # fmt: skip
        return DataConfig(**given)

    return write


def documents(tokens):
    """Ids and weights of each document."""
    edges = [0, *tokens.ends]
    return [(tokens.tokens[a:b].tolist(), tokens.weights[a:b].tolist()) for a, b in itertools.pairwise(edges)]


def test_only_the_assistant_s_words_and_their_end_are_learned(write, tmp_path):
    prepared = prepare(write([talk(i, f"answer {i}", weight=0.5 + i % 2) for i in range(60)]), BYTES, tmp_path / "data")
    tokenizer = prepared.tokenizer
    found = documents(prepared.train) + documents(prepared.val)
    assert len(found) == 60 and prepared.manifest["weights"]
    for ids, weights in found:
        learned = [i for i, weight in zip(ids, weights, strict=True) if weight]
        number = int(tokenizer.decode(learned).removeprefix("answer "))
        assert learned == [*tokenizer.encode(f"answer {number}"), tokenizer.end_id]
        assert {w for w in weights if w} == {0.5 + number % 2}
        asked = [{"role": "user", "content": f"question {number}?"}]
        assert ids == tokenizer.apply_chat([*asked, {"role": "assistant", "content": f"answer {number}"}])[0]


def test_texts_are_learned_whole(write, tmp_path):
    texts = [Sample(f"t{i}", text=f"text {i}", weight=2.0) for i in range(40)]
    prepared = prepare(write([*texts, *map(talk, range(5))]), BYTES, tmp_path / "data")
    for ids, weights in documents(prepared.train):
        if ids[0] < 256:
            assert prepared.tokenizer.decode(ids).startswith("text ") and ids[-1] == prepared.tokenizer.end_id
            assert set(weights) == {2.0}


def test_the_split_is_by_question_alone_and_near_the_fraction(write, tmp_path):
    first = Chat(write(map(talk, range(500))).path, 0.2, tmp_path)
    split = {sample.id: first.split_of(sample) for sample in first.samples()}
    assert 70 < list(split.values()).count("val") < 130
    more = Chat(write(map(talk, range(300, 800)), name="more.jsonl").path, 0.2, tmp_path)  # of another id as well
    assert all(split.get(sample.id, more.split_of(sample)) == more.split_of(sample) for sample in more.samples())


def test_what_several_teachers_answered_to_one_prompt_is_never_divided(write, tmp_path):
    asked = [(i, name) for i in range(200) for name in ("a", "b", "c")]
    rows = [Sample(f"{a}{i}", talk(i, a).messages, None, "teacher", 1.0, {"prompt": f"p{i}"}) for i, a in asked]
    source = Chat(write(rows).path, 0.2, tmp_path)
    found = {split: {sample.provenance["prompt"] for sample in source.samples_of(split)} for split in ("train", "val")}
    assert not found["train"] & found["val"] and 20 < len(found["val"]) < 60
    documents = [len(list(source.documents(split))) for split in ("train", "val")]
    assert documents == [3 * len(found["train"]), 3 * len(found["val"])]


def test_a_question_stands_in_one_part_however_often_it_is_asked(write, tmp_path):
    """Under other ids, answers and system messages, alone and at the beginning of a longer talk, named or not."""
    rows = list[Sample]()
    for i in range(100):
        asked, answer = {"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": "yes"}
        system, more = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}
        for name, messages in (
            ("a", [asked, answer]), ("b", [system, asked, {**answer, "content": "no"}]),
            ("c", [asked, answer, more, answer]), ("d", [{**answer, "content": "Hello."}, asked, answer]),
        ):  # fmt: skip
            named = {"prompt": prompt_id(messages[:-1])} if name in "bc" else {}  # as elara.collect writes it
            rows.append(Sample(f"{name}{i}", tuple(messages), provenance=named))
    source = Chat(write(rows).path, 0.2, tmp_path)
    found = {split: {sample.id[1:] for sample in source.samples_of(split)} for split in ("train", "val")}
    assert not found["train"] & found["val"] and 8 < len(found["val"]) < 35


def test_made_talk_is_held_out_by_its_words(tmp_path):
    source = open_samples(DataConfig(source="tool_use", samples=2000, val_fraction=0.1), tmp_path)
    found: dict[str, set[str]] = {}
    for split in SPLITS:
        samples = [sample for sample in source.samples_of(split) if sample.provenance["family"] == "talk"]
        asked = [m["content"] for sample in samples for m in sample.messages or () if m["role"] == "user"]
        found[split] = {re.sub(r"\W", "", text).lower() for text in asked}
    assert len(found["train"]) > 50 and len(found["val"]) > 4
    assert not found["train"] & found["val"]


CALL = {"id": "x", "type": "function", "function": {"name": "calculate", "arguments": '{"expression": "2*3"}'}}


def test_openai_s_tool_calls_are_written_as_models_learn_them(write, tmp_path, capsys):
    rows = []
    for i in range(40):
        call = {**CALL, "function": {"name": "calculate", "arguments": json.dumps({"expression": f"2*{i}"})}}
        parts = [{"type": "text", "text": "Double "}, {"type": "text", "text": f"{i}"}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": str(2 * i), "tool_call_id": "x"},
            {"role": "assistant", "content": f"It is {2 * i}.", "tool_calls": []},
        ]  # fmt: skip
        rows.append(json.dumps({"id": f"x{i}", "messages": messages}))
    prepared = prepare(write(rows), BYTES, tmp_path / "data")
    tokenizer = prepared.tokenizer
    for ids, weights in documents(prepared.train):
        said = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight])
        begun, _, answer = said.partition("</tool_call>")
        made = parse_call(begun + "</tool_call>")
        assert made is not None
        number = int(made.arguments["expression"].removeprefix("2*"))
        wanted = conversation_of(made, f"Double {number}", str(2 * number), f"It is {2 * number}.")
        assert ids == tokenizer.apply_chat(wanted)[0] and answer == f"It is {2 * number}."
    assert capsys.readouterr().err == ""


def conversation_of(call, question, said, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": call.text()},
            {"role": "tool", "content": said}, {"role": "assistant", "content": answer}]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "Let me see.", "tool_calls": [CALL]}, 'Let me see.\n<tool_call>{"name": "calculate", "arguments": '
         '{"expression": "2*3"}}</tool_call>'),
        ({"content": "", "tool_calls": [CALL, {"name": "now", "arguments": {}}]}, '<tool_call>{"name": "calculate", '
         '"arguments": {"expression": "2*3"}}</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        ({"content": None, "function_call": {"name": "now", "arguments": ""}},
         '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
    ],
)  # fmt: skip
def test_calls_stand_behind_the_words_a_line_each(message, content):
    asked = {"role": "user", "content": "?"}
    sample = Sample.of({"id": "s", "messages": [asked, {"role": "assistant", **message}]}, "here")
    assert sample.messages is not None and not sample.unread
    assert sample.messages[1] == {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": "", "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments that are no JSON object"),
        ({"content": "", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments that are no JSON object"),
        ({"content": "", "tool_calls": [{"function": {"arguments": "{}"}}]}, "a tool call without a name"),
        ({"content": "", "tool_calls": {"name": "f"}}, "tool_calls that are no list"),
        ({"content": "", "tool_calls": [CALL], "role": "user"}, "role user calls a tool"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of type image_url"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "a part of type refusal"),
        ({"content": None, "refusal": "I cannot."}, "no content but words under refusal"),
        ({"content": None}, "role assistant whose content is no text"),
    ],
)
def test_what_cannot_be_written_is_refused_with_file_and_line(write, tmp_path, message, why):
    row = {"id": "bad", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", **message}]}
    with pytest.raises(ElaraError, match=rf"chat\.jsonl, line 2: .*{why}"):
        prepare(write([talk(1), json.dumps(row)]), BYTES, tmp_path / "data")


def test_words_that_are_not_learned_are_named(write, tmp_path, capsys):
    rows = []
    for i in range(40):
        row = talk(i).row()
        row["messages"][1] |= {"reasoning_content": "Hm."} if i < 3 else {"audio": None, "index": 1}
        rows.append(json.dumps({**row, "tools": [CALL] if i == 7 else []}))
    prepare(write(rows), BYTES, tmp_path / "data")
    note = "note: words under these keys are not learned: reasoning_content (3 samples), tools (1 samples)\n"
    assert capsys.readouterr().err == note


def test_changed_samples_are_prepared_anew(write, tmp_path):
    before = prepare(write(map(talk, range(50))), BYTES, tmp_path / "data")
    assert prepare(write(map(talk, range(50))), BYTES, tmp_path / "data").folder == before.folder
    after = prepare(write(map(talk, range(51))), BYTES, tmp_path / "data")
    assert after.folder != before.folder
    assert not before.folder.exists()
    assert prepare(write(map(talk, range(51)), val_fraction=0.3), BYTES, tmp_path / "data").folder != after.folder


def test_windows_hold_whole_conversations_and_weights_come_along(write, tmp_path):
    module = ElaraData(write(map(talk, range(200))), BYTES, tmp_path / "data", seed=1, seq=64)
    assert module.chat
    batches, user = module.train_batches(), module.prepared.tokenizer.role_ids["user"]
    every = [batches[i] for i in range(len(batches))]
    rows = torch.cat([batch.tokens for batch in every])
    assert (rows[:, 0] == user).all(), "every window begins with a conversation"
    assert (rows == user).sum() > 2 * len(rows), "and holds several"
    for batch in every:
        assert batch.weights is not None
        assert ((batch.weights > 0) <= (batch.tokens >= 0)).all()


def test_what_is_longer_than_a_window_is_split_and_said(write, tmp_path, capsys):
    module = ElaraData(write([*map(talk, range(50)), talk(62, "long " * 40)]), BYTES, tmp_path / "data", seed=1, seq=64)
    module.train_batches()
    documents = len(module.prepared.train.ends)
    wanted = f"note: 1 of {documents} documents is longer than a window of 64 tokens and is split\n"
    assert documents > 35 and capsys.readouterr().err == wanted


def test_samples_without_words_of_an_assistant_are_left_out_and_counted(write, tmp_path, capsys):
    silent = Sample("silent", ({"role": "user", "content": "hello?"},))
    prepared = prepare(write([*map(talk, range(40)), silent, talk(77, weight=0.0)]), BYTES, tmp_path / "data")
    assert sum(prepared.manifest[split]["documents"] for split in ("train", "val")) == 40
    assert capsys.readouterr().err.startswith("note: 2 samples have nothing to learn (no assistant message, ")


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([Sample("a", ({"role": "user", "content": "hello?"},))], {}, "none of its 1 samples has words of an "),
        ([talk(1)], {}, "no sample fell to the val part; give more or set data.val_fraction"),
        ([talk(1), "{'id': 3}"], {}, "chat.jsonl, line 2 is not JSON"),
        ([talk(1), '{"id": "x", "messages": [{"role": "cat"}]}'], {}, "line 2: sample x has a message of role .cat."),
        ([talk(1, weight=1e6)], {}, "sample s1 has weight 1e\\+06: give 1000 at most"),
        ([talk(1)], {"path": None}, "data=chat needs data.path="),
        ([talk(1)], {"path": "/no/such"}, "/no/such does not exist"),
        ([talk(1)], {"val_fraction": 0.0}, "data.val_fraction=0.0 must be above 0"),
        ([], {"source": "tool_use", "families": ["cooking"]}, "data.families: there is no cooking; give some of arith"),
        ([], {"source": "tool_use", "families": []}, "data.families: none is named"),
        ([], {"source": "tool_use", "samples": 1}, "data.samples=1 must be at least 2"),
    ],
)
def test_refusals_are_one_line(write, tmp_path, samples, options, message):
    with pytest.raises(ElaraError, match=message) as error:
        prepare(write(samples, **options), BYTES, tmp_path / "data")
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused(write, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ElaraError, match=r"empty holds no samples"):
        prepare(write([], path=str(tmp_path / "empty")), BYTES, tmp_path / "data")


def test_held_out_conversations_can_be_read_as_text(write, tmp_path):
    source = open_source(write(map(talk, range(50))), tmp_path)
    found = ["".join(document) for split in ("train", "val") for document in source.documents(split)]
    assert sorted(found) == sorted(f"question {i}?\nyes\n" for i in range(50))


def test_made_conversations_are_data_as_well(tmp_path):
    data = DataConfig("tool_use", "tool_use", samples=200, batch_size=2, cross_documents=False, pack=True)
    module = ElaraData(data, BYTES, tmp_path / "data", seed=1, seq=384)
    text = module.prepared.tokenizer.decode(module.train_batches()[0].tokens.clamp(min=0).flatten().tolist())
    assert '<tool_call>{"name": "' in text and '{"result": ' in text


@pytest.fixture
def mixed(write, tmp_path):
    """Makes data of conversations with a replay of a text, which is all capitals."""
    (tmp_path / "old.txt").write_text("SOME OLD TEXT THAT GOES ON AND ON.\n" * 200)

    def make(share=0.5, **options):
        replay = ReplayConfig(share=share, source="text", path=str(tmp_path / "old.txt"))
        data = write(map(talk, range(200)), batch_size=4, replay=replay, **options)
        return ElaraData(data, BYTES, tmp_path / "data", seed=1, seq=64)

    return make


def test_a_replay_takes_its_share_of_every_batch_and_is_learned_whole(mixed):
    module = mixed(0.25)
    decode = module.prepared.tokenizer.decode
    for batch in itertools.islice(module.train_dataloader(), 300):  # several epochs of both
        assert batch.tokens.shape == batch.weights.shape == (4, 65)
        texts = [decode(row[row >= 0].tolist()) for row in batch.tokens]
        assert ["OLD" in text for text in texts] == [False, False, False, True]
        assert ((batch.weights > 0) == (batch.tokens >= 0))[3].all()
        assert all(weights.sum() < 40 for weights in batch.weights[:3])
    validated = torch.cat([batch.tokens for batch in module.val_dataloader()])
    assert "OLD" not in decode(validated[validated >= 0].tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_replay_goes_on_anywhere_exactly(mixed, workers):
    whole = list(itertools.islice(mixed().train_dataloader(), 120))
    for position in (1, 17, 100):
        module = mixed(workers=workers)
        module.start = mixed().consumed(position)
        rest = list(itertools.islice(module.train_dataloader(), 10))
        for mine, theirs in zip(rest, whole[position:], strict=False):
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.weights, theirs.weights)


def test_ranks_read_different_rows_that_are_those_of_one_with_the_batch_of_all(mixed, monkeypatch):
    alone = mixed()
    alone.data.batch_size = 8
    both = []
    for rank in range(2):
        module = mixed()
        monkeypatch.setattr(module, "_rank", lambda rank=rank: (rank, 2))
        both.append(module.train_batches())
    for i in range(5):
        rows = sorted(map(tuple, torch.cat([batches[i].tokens for batches in both]).tolist()))
        assert rows == sorted(map(tuple, alone.train_batches()[i].tokens.tolist()))


@pytest.mark.parametrize(("share", "rows"), [(0.01, 0), (0.9, 4), (1.0, 4), (-0.5, -2)])
def test_a_share_that_leaves_one_corpus_without_rows_is_refused(mixed, share, rows):
    with pytest.raises(ElaraError, match=f"data.replay.share={share} of data.batch_size=4 is {rows} rows: each corpus"):
        mixed(share).train_batches()


def test_a_replay_with_other_characters_than_the_tokenizer_s_is_refused_in_one_line(mixed):
    module = mixed()
    module.tokenizer_config = TokenizerConfig("char")
    with pytest.raises(ElaraError, match="character 'S'") as error:
        module.train_batches()
    assert "\n" not in str(error.value)
