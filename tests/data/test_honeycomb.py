"""Memory as data: what is learned of documents, feedback and answers, how often, in which part, with which passages."""

from __future__ import annotations

import itertools
import json
import math
import re
import sqlite3
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.collect.prompts import Prompt
from elara.data import DataConfig, prepare
from elara.data.config import HoneycombConfig, MixConfig, RagConfig
from elara.data.passages import Search, cut, question_with
from elara.data.samples import Sample
from elara.data.sources import SPLITS, open_source
from elara.data.sources.honeycomb import Honeycomb
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig
from tests.conftest import TINY

BYTES = TokenizerConfig("byte")


def talk(question, answer):
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def document(i, text=None):
    return Sample(f"d{i}", text=text or f"document {i} tells of word{i}x")


def feedback(i, rating=1.0, weight=1.0, **provenance):
    known = {"rating": rating, **provenance}
    return Sample(f"f{i}", talk(f"what is word{i}x?", f"good {i}"), None, "feedback", weight, known)


def teacher(i, name="smollm2", **provenance):
    return Sample(f"{name}{i}", talk(f"say {i}!", f"{name} says {i}"), source="teacher", provenance=provenance)


def memory(count=60):
    return [make(i) for i in range(count) for make in (document, feedback, teacher)]


@pytest.fixture
def write(tmp_path):
    """Writes a folder of samples (or plain lines) and gives the configuration that reads it."""

    def write(rows, mix=None, rag=None, min_rating=0.5, **options):
        folder = tmp_path / "memory"
        folder.mkdir(exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row.row()) for row in rows]
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
        made = HoneycombConfig(min_rating, MixConfig(**(mix or {})), RagConfig(**(rag or {})))
        given = {"name": "honeycomb", "source": "honeycomb", "path": str(folder), "val_fraction": 0.2, **options}
        return DataConfig(cross_documents=False, pack=True, honeycomb=made, **given)

    return write


@pytest.fixture
def read(write, tmp_path):
    """Prepares samples and gives what lies in each part: texts, or messages as (role, words), with their weights."""

    def read(rows, **options):
        prepared = prepare(write(rows, **options), BYTES, tmp_path / "data")
        return [parts(prepared, tokens) for tokens in (prepared.train, prepared.val)]

    return read


def memory_of(data, root):
    source = open_source(data, root)
    assert isinstance(source, Honeycomb)
    return source


def parts(prepared, tokens):
    tokenizer, found = prepared.tokenizer, []
    roles = {number: role for role, number in tokenizer.role_ids.items()}
    for a, b in itertools.pairwise([0, *tokens.ends]):
        ids, weights = tokens.tokens[a:b].tolist(), set(tokens.weights[a:b].tolist())
        begins = [i for i, token in enumerate(ids) if token in roles]
        messages = [(roles[ids[i]], tokenizer.decode(ids[i + 1 : j])) for i, j in itertools.pairwise([*begins, b - a])]
        found.append((messages or tokenizer.decode(ids), weights))
    return found


def questions(part):
    return [messages[0][1] for messages, _ in part if not isinstance(messages, str)]


def test_feedback_is_learned_by_its_rating_and_what_is_bad_is_left_out(read, capsys):
    ratings = [0, 0.25, 0.5, 0.75, 1]
    rows = [feedback(i, ratings[i % 5], weight=1 + i % 2) for i in range(100)]
    train, val = read(rows)
    said = capsys.readouterr().err
    assert "note: 40 feedback samples rated below data.honeycomb.min_rating=0.5 are left out\n" in said
    found = {messages[1][1]: weights for messages, weights in train + val}
    wanted = {f"good {i}": {0.0, (1 + i % 2) * ratings[i % 5]} for i in range(100) if ratings[i % 5] >= 0.5}
    assert found == wanted
    train, val = read(rows, min_rating=0.1)
    assert len(train + val) == 80
    read(rows, min_rating=0.0)  # a rating of 0 weighs nothing
    assert "note: 20 samples have nothing to learn" in capsys.readouterr().err


def test_what_the_user_wanted_takes_the_place_of_the_last_answer_however_that_was_rated(read):
    turns = (*talk("one?", "1"), *talk("two?", "3"), {"role": "user", "content": "wrong!"})
    rows = [Sample(f"c{i}", turns, None, "feedback", 2.0, {"rating": 0, "correction": f"{i}"}) for i in range(20)]
    unrated = Sample("u", turns, None, "feedback", 2.0, {"correction": "20"})
    train, val = read([*rows, unrated, *map(document, range(20))])
    found = [(messages, weights) for messages, weights in train + val if not isinstance(messages, str)]
    assert {messages[3][1] for messages, _ in found} == {str(i) for i in range(21)}
    for messages, weights in found:
        words = ["one?", "1", "two?", messages[3][1], "wrong!"]
        assert messages == list(zip(["user", "assistant"] * 2 + ["user"], words, strict=True))
        assert weights == {0.0, 2.0}


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.tuples(st.floats(0.2, 4), st.floats(0, 4), st.floats(0, 4)))
def test_mixing_weights_say_how_often_and_leave_the_validation_part_alone(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("memory")
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row.row()) for row in memory(100)))
    kinds = dict(zip(("document", "feedback", "teacher"), weights, strict=True))
    made = HoneycombConfig(mix=MixConfig(**kinds))
    data = DataConfig("honeycomb", "honeycomb", str(folder), val_fraction=0.2, honeycomb=made)
    source = memory_of(data, folder)
    counts = Counter(sample.id for sample in source.samples_of("train"))
    held_out = [sample.id for sample in source.samples_of("val")]
    assert held_out == [row.id for row in memory(100) if source.split_of(row) == "val"]
    for row in memory(100):
        weight = kinds[row.source]
        assert row.id in held_out or counts[row.id] in (math.floor(weight), math.floor(weight) + (weight % 1 > 0))
    for kind, weight in kinds.items():
        mine = [row.id for row in memory(100) if row.source == kind and row.id not in held_out]
        assert sum(counts[key] for key in mine) / len(mine) == pytest.approx(weight, abs=0.25)
    assert not counts.keys() & set(held_out)


def test_copies_lie_apart_in_the_prepared_text(read):
    train, val = read(memory(), mix={"document": 2.5, "feedback": 0.3})
    names = [content if isinstance(content, str) else content[1][1] for content, _ in train]
    assert all(a != b for a, b in itertools.pairwise(names))
    counts = Counter(names)
    documents = {counts[row.text] for row in memory() if row.text in counts}
    assert documents == {2, 3} and 5 < sum(name.startswith("good") for name in counts) < 25
    assert all(counts[name] == 1 for name in counts if name.startswith("smollm2 says"))
    assert len(val) == len({str(content) for content, _ in val}) > 20


def test_other_kinds_count_as_what_they_hold(write, tmp_path):
    texts = [Sample(f"n{i}", text=f"note {i}", source="note") for i in range(40)]
    talks = [Sample(f"t{i}", talk(f"{i}?", "yes"), source=kind) for i in range(40) for kind in ["tool_use"]]
    unnamed = [Sample(f"u{i}", talk(f"{i} then?", "yes")) for i in range(40)]  # a source left out reads `document`
    source = memory_of(write([*texts, *talks, *unnamed], mix={"document": 0, "teacher": 2, "feedback": 5}), tmp_path)
    counts = Counter(sample.id for sample in source.samples_of("train"))
    assert set(counts.values()) == {2} and {name[0] for name in counts} == {"t", "u"}


def test_passages_come_before_the_question_from_the_same_part_only(read, write, tmp_path):
    rows = memory(80)
    train, val = read(rows, rag={"k": 2, "dropout": 0.0})
    texts = [{content for content, _ in part if isinstance(content, str)} for part in (train, val)]
    seen = 0
    for part, own, other in zip((train, val), texts, reversed(texts), strict=True):
        for asked in questions(part):
            lines = asked.split("\n")
            found = [line.split("] ", 1)[1] for line in lines if line.startswith("[")]
            assert set(found) <= own and not set(found) & other
            if not found:
                assert "\n" not in asked
                continue
            assert lines[0] == "Passages:" and lines[len(found) + 1] == "" and len(lines) == len(found) + 3
            assert [line[:3] for line in lines[1 : len(found) + 1]] == ["[1]", "[2]"][: len(found)]
            assert lines[-1].startswith("Question: ")
        for i in range(80):
            if document(i).text in own and (mine := [asked for asked in questions(part) if f"word{i}x?" in asked]):
                assert mine == [f"Passages:\n[1] {document(i).text}\n\nQuestion: what is word{i}x?"]
                seen += 1
    assert seen > 30
    source = memory_of(write(rows, rag={"k": 2}), tmp_path)
    for split in SPLITS:  # the passages do not move a question to the other part
        wanted = [sample for sample in source.samples() if source.split_of(sample) == split]
        assert list(source.samples_of(split)) == wanted


def test_the_last_question_before_the_last_answer_is_searched_for(write, tmp_path):
    turns = (*talk("what is bee?", "b"), *talk("what is wax?", "w"), {"role": "user", "content": "thanks for the bee"})
    texts = [Sample(f"d{i}{word}", text=f"{word} number{i}") for i in range(20) for word in ("bee", "wax", "sky")]
    rows = [*texts, *(Sample(f"t{i}", turns) for i in range(3))]
    source = memory_of(write(rows, rag={"k": 1, "dropout": 0.0}), tmp_path)
    for sample in source.samples():
        if sample.messages:
            first, _, asked, _, last = (message["content"] for message in sample.messages)
            assert (first, last) == ("what is bee?", "thanks for the bee")
            assert re.fullmatch(r"Passages:\n\[1\] wax number\d+\n\nQuestion: what is wax\?", asked)


def test_dropout_leaves_a_share_of_the_conversations_without_passages(write, tmp_path):
    rows = [document(i, f"what does document {i} say") for i in range(30)] + [feedback(i) for i in range(300)]
    shares = {}
    for dropout in (0.0, 0.3, 1.0):
        source = memory_of(write(rows, rag={"k": 1, "dropout": dropout}), tmp_path)
        asked = {s.id: s.messages[-2]["content"] for s in source.samples() if s.messages}
        shares[dropout] = {name for name, words in asked.items() if not words.startswith("Passages:\n[1] what")}
        assert len(asked) == 300
    assert not shares[0.0] and len(shares[1.0]) == 300
    assert 60 < len(shares[0.3]) < 120


def test_all_about_one_question_falls_into_one_part(write, tmp_path):
    rows = []
    for i in range(60):
        asked = talk(f"what is word{i}x?", "")[:1]
        named = {"prompt": Prompt.of(asked).id}  # as answers are collected
        turns = (*talk(f"what is word{i}x?", "x"), *talk("and then?", "y"))
        rows += [Sample(f"{name}{i}", talk(asked[0]["content"], name), None, "teacher", 1.0, named) for name in "abc"]
        rows += [feedback(i), Sample(f"m{i}", turns, None, "feedback", 1.0, {"rating": 1})]
        rows += [Sample(f"other{i}", talk(f"in other words {i}?", "z"), provenance=named)]
    for rag in ({"k": 0}, {"k": 1, "dropout": 0.0}):
        source = memory_of(write([*rows, *map(document, range(60))], rag=rag), tmp_path)
        found = {split: [sample for sample in source.samples_of(split) if sample.messages] for split in SPLITS}
        numbers = {split: {re.sub(r"\D", "", sample.id) for sample in found[split]} for split in SPLITS}
        assert not numbers["train"] & numbers["val"] and 3 < len(numbers["val"]) < 25
        assert len(found["train"]) + len(found["val"]) == 360


def test_every_setting_that_changes_tokens_is_prepared_anew(write, tmp_path):
    rows = memory()

    def folder(**options):
        return prepare(write(rows, **options), BYTES, tmp_path / "data").folder

    first = folder()
    rag = {"k": 1, "dropout": 0.5, "passage": 50}
    others = [
        folder(min_rating=0.9), folder(mix={"document": 2.0}), folder(mix={"feedback": 2.0}), folder(rag=rag),
        folder(mix={"teacher": 2.0}), folder(rag={**rag, "k": 2}), folder(rag={**rag, "dropout": 0.1}),
        folder(rag={**rag, "passage": 9}), folder(val_fraction=0.3), folder(source="chat"),
    ]  # fmt: skip
    assert len({first, *others}) == 11
    assert folder(rag={"k": 0, "dropout": 0.7, "passage": 9}) == first, "without passages nothing of them matters"


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_the_same_memory_makes_the_same_tokens(write, tmp_path, kind):
    data = write(memory(), mix={"teacher": 1.5}, rag={"k": 2})
    made = [prepare(data, TokenizerConfig(kind), tmp_path / name) for name in ("one", "two")]
    assert made[0].manifest["train"] == made[1].manifest["train"] and made[0].manifest["val"] == made[1].manifest["val"]
    weights = [(folder.folder / "train.weights").read_bytes() for folder in made]
    assert weights[0] == weights[1]


def test_a_part_without_documents_is_said(write, tmp_path, capsys):
    prepare(write([document(0), *map(feedback, range(40))], rag={"k": 1}), BYTES, tmp_path / "data")
    assert re.search(r"note: no document fell to the (val|train) part: its questions stay", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {"path": None}, "data=honeycomb needs data.path=<a folder"),
        ([], {"path": "/no/such"}, "/no/such does not exist"),
        ([], {}, "memory: no sample is left, its files are empty"),
        ([feedback(1, 0.2), feedback(2, 0.1)], {}, "is left, 2 rated below data.honeycomb.min_rating=0.5: lower it"),
        ([feedback(1)], {"rag": {"k": 1}}, "holds no document to search: data.honeycomb.rag.k=1 needs sampl"),
        ([feedback(1, "good")], {}, "sample f1 has provenance.rating 'good': give a number from 0, bad, to 1, good"),
        ([feedback(1, True)], {}, "sample f1 has provenance.rating True"),
        ([feedback(1, 5)], {}, "sample f1 has provenance.rating 5"),
        ([feedback(1, float("nan"))], {}, "sample f1 has provenance.rating nan"),
        ([feedback(1, -0.1)], {}, "sample f1 has provenance.rating -0.1"),
        ([feedback(1, 7, correction="x")], {}, "sample f1 has provenance.rating 7"),
        ([feedback(1, None)], {}, "sample f1 has provenance.rating None"),
        ([feedback(1, correction=3)], {}, "sample f1 has a provenance.correction that is no text, or no answer"),
        ([feedback(1, correction="")], {}, "sample f1 has a provenance.correction that is no text, or no answer"),
        ([Sample("x", talk("a", "b")[:1], None, "feedback", 1.0, {"correction": "c"})], {}, "no answer to replace"),
        ([Sample("x", text="a", source="feedback")], {}, "sample x is feedback without messages"),
        (['{"id": "x", "text": "a", "provenance": [1]}'], {}, "1: sample x has a provenance that is no JSON object"),
        ([feedback(1)], {"mix": {"teacher": -1.0}}, "data.honeycomb.mix.teacher=-1 must be from 0 to 100"),
        ([feedback(1)], {"mix": {"teacher": float("nan")}}, "data.honeycomb.mix.teacher=nan must be from 0 to 100"),
        ([feedback(1)], {"mix": {"document": 1e9}}, "data.honeycomb.mix.document=1e\\+09 must be from 0 to 100"),
        (memory(9), {"mix": {"document": 0, "feedback": 0, "teacher": 0}}, "leaves nothing to train on: raise a"),
        ([feedback(1)], {"min_rating": 1.5}, "data.honeycomb.min_rating=1.5 must be from 0 to 1"),
        ([feedback(1)], {"rag": {"dropout": -0.5}}, "data.honeycomb.rag.dropout=-0.5 must be from 0 to 1"),
        ([feedback(1)], {"rag": {"k": -1}}, "data.honeycomb.rag.k=-1 must be at least 0"),
        ([feedback(1)], {"rag": {"passage": 0}}, "data.honeycomb.rag.passage=0 at least 1"),
        ([feedback(1)], {"val_fraction": 0.0}, "data.val_fraction=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(write, tmp_path, rows, options, message):
    with pytest.raises(ElaraError, match=message) as error:
        prepare(write(rows, **options), BYTES, tmp_path / "data")
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused(write, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ElaraError, match="empty holds no samples"):
        prepare(write([], path=str(tmp_path / "empty")), BYTES, tmp_path / "data")


def test_without_fts5_one_line_says_so(write, tmp_path, monkeypatch):
    class Without(sqlite3.Connection):
        def execute(self, *_):
            raise sqlite3.OperationalError("no such module: fts5")

    connect = sqlite3.connect
    monkeypatch.setattr("elara.data.passages.sqlite3.connect", lambda place: connect(place, factory=Without))
    with pytest.raises(ElaraError, match=r"FTS5, which this Python lacks \(no such module: fts5\): set data"):
        prepare(write(memory(), rag={"k": 1}), BYTES, tmp_path / "data")


def bm25(texts, question):
    """Robertson and Zaragoza 2009, equation 3.15, with k1 = 1.2, b = 0.75 and no weight for words of half the texts."""
    split = [text.split() for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = [0.0] * len(texts)
    for word in set(question.split()):
        holding = sum(word in words for words in split)
        idf = max(0.0, math.log((len(texts) - holding + 0.5) / (holding + 0.5)))
        for i, words in enumerate(split):
            count = words.count(word)
            scores[i] += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(words) / mean))
    return scores


WORD = st.sampled_from(["bee", "wax", "sky", "hive", "drone", "queen", "honey", "flower", "comb", "sting"])
SENTENCE = st.lists(WORD, min_size=1, max_size=12).map(" ".join)


@settings(deadline=None, max_examples=100)
@given(st.lists(SENTENCE, min_size=2, max_size=12), SENTENCE)
def test_the_best_passages_are_those_of_bm25(texts, question):
    scores = bm25(texts, question)
    telling = [i for i in sorted(range(len(texts)), key=lambda i: -scores[i]) if scores[i] > 1e-4]
    found = Search(texts).best(question, 3)
    known = dict(zip(texts, scores, strict=True))
    wanted = [scores[i] for i in telling][:3]
    assert [known[text] for text in found][: len(wanted)] == pytest.approx(wanted, abs=1e-4)


ANY = st.text(st.characters(), max_size=30) | st.sampled_from(
    ['"', "'", "a OR", "NEAR(a b)", "a AND NOT b", "words:x", "a*", "^a", "-a", "(", "{a b}: c", "\0", "x\0y", "ﬀ ½ ²"]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(ANY, max_size=8), ANY, st.integers(0, 4))
def test_any_text_can_be_asked_and_searched(texts, question, k):
    search = Search(texts)
    found = search.best(question, k)
    assert len(found) <= k and set(found) <= set(texts) and found == search.best(question, k)
    for text in texts:
        if k and any(part.isascii() and part.isalnum() for part in re.split(r"\W+", text)):
            assert search.best(text, 1), "what holds a word finds itself or a better one"


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n"), max_size=80), st.integers(1, 20))
def test_passages_are_the_text_in_order_and_never_longer(text, length):
    made = list(cut([text], length))
    assert all(0 < len(passage) <= length for passage in made)
    assert "".join("".join(made).split()) == "".join(text.split())


def test_words_are_cut_only_where_no_space_is_near():
    text = "honey is made by bees in a hive of wax " * 20
    assert set(" ".join(cut([text], 40)).split()) == set(text.split())
    assert list(cut(["a" * 7, "a" * 18], 10)) == ["a" * 10, "a" * 10, "a" * 5]


def test_a_question_without_passages_stays_as_it_is():
    assert question_with([], "why?") == "why?"
    assert question_with(["one", "two"], "why?") == "Passages:\n[1] one\n[2] two\n\nQuestion: why?"


@pytest.mark.slow
def test_memory_trains_a_model_and_a_typo_is_an_error(write, home):
    data = write(memory(100))
    tiny = [part for part in TINY if not part.startswith(("data=", "callbacks."))]
    given = [*tiny, "data=honeycomb", f"data.path={data.path}", "name=memory", "callbacks=none", "trainer.max_steps=4",
             "trainer.val_check_interval=4", "model.context_length=96"]  # fmt: skip
    done = home.call(*given, "data.honeycomb.rag.kk=1")
    assert done.returncode == 1 and "data.honeycomb.rag.kk" in done.stderr and done.stderr.count("\n") == 1
    done = home.call(*given, "data.honeycomb.rag.k=1")
    assert done.returncode == 0, done.stderr
    assert "done: 4 steps, held-out loss" in done.stdout
