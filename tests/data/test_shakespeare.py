"""The plays as text: clean, complete, split by play."""

import re

import pytest

from elara.data.sources.shakespeare import HELD_OUT, Shakespeare, convert


@pytest.fixture(scope="module")
def plays(archive_cache):
    source = Shakespeare(archive_cache)
    return {name: convert(markdown) for name, markdown in source._plays()}


def test_a_scene_becomes_names_and_lines():
    markdown = "\n".join(
        [
            "# Hamlet", "", "## ACT I", "", "### SCENE I. Elsinore.", "",
            "_Enter HAMLET, with a", "skull_", "",
            "**HAMLET**  ", "_\\[Aside]_  ", "Alas, poor Yorick!-- I knew  ", "him — Horatio: “a fellow”.", "",
            "_Exit Horatio_", "", "Here hung those lips", "",
            "**First Clown**  ", "_\\[Sings]_", "",
            "**GREY & SCROOP**  ", "O, a pit of clay for to be made", "",
        ]
    )  # fmt: skip
    assert convert(markdown) == (
        "HAMLET:\nAlas, poor Yorick!--I knew\nhim--Horatio: 'a fellow'.\nHere hung those lips\n\n"
        "GREY AND SCROOP:\nO, a pit of clay for to be made\n\n"
    )


@pytest.mark.slow
def test_the_whole_corpus_is_there(plays):
    assert len(plays) == 38
    assert 4.7e6 < sum(map(len, plays.values())) < 4.9e6
    assert min(map(len, plays.values())) > 80_000


def test_no_markup_is_left(plays):
    letters = set("".join(plays.values()))
    assert letters == set("\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    for text in plays.values():
        assert "\n\n\n" not in text
        assert not re.search(r"(?m)^ | $|^(Exit|Exeunt|Re-enter|Enter [A-Z]{2})", text)


def test_every_speech_has_a_name_on_its_own_line(plays):
    for text in plays.values():
        assert text.endswith("\n\n")
        for speech in text[:-2].split("\n\n"):
            name, _, lines = speech.partition("\n")
            assert re.fullmatch(r"[A-Z][A-Z' -]+:", name)
            assert lines.strip()
            assert not re.search(r"(?m)^[A-Z][A-Z' -]{3,}:$", lines)


def test_famous_lines_are_complete(plays):
    assert "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler" in plays["hamlet"]
    assert plays["romeo-and-juliet"].count("\nROMEO:\n") > 150
    assert "BISHOP OF WINCHESTER:\nHe was a king bless'd of the King of kings." in plays["henry-vi-part-1"]
    assert "LORD CHIEF-JUSTICE:\nWhat's he that goes there?" in plays["henry-iv-part-2"]


@pytest.mark.slow
def test_whole_plays_are_held_out(plays, archive_cache):
    source = Shakespeare(archive_cache)
    val = ["".join(document) for document in source.documents("val")]
    train = ["".join(document) for document in source.documents("train")]
    assert sorted(val) == sorted(plays[name] for name in HELD_OUT)
    assert sorted(train + val) == sorted(plays.values())
    assert 0.08 < sum(map(len, val)) / sum(map(len, plays.values())) < 0.12
    assert set("".join(val)) <= set("".join(train))
