"""The tokenizer of elara/elara.py, read from a file, against the one that the model was trained with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.data.sources.shakespeare import Shakespeare
from elara.elara import GGUFError, Reader
from elara.elara import Tokenizer as RuntimeTokenizer
from elara.export.files import write_model
from elara.export.layout import COMPACT
from elara.tokenizer import Tokenizer
from elara.tokenizer.char import CharTokenizer
from tests.conftest import ROOT
from tests.export.conftest import MAKE, TEXT, config

HARD = [
    "I'll can't WE'RE they'Ve don'tve 1234567 3.14 a1b2", "  two  spaces\n\n\tand\r\ntabs   ", "naïve café Straße Ǆ ﬁ",
    "日本語のテキスト 中文 한국어", "עברית العربية हिन्दी ไทย", "👩\u200d👩\u200d👧 🏳️\u200d🌈 🇩🇪 👍🏽", "²³¹ Ⅷ ½ ٣ ௩ 𝟛",
    "e\u0301 a\u030a n\u0303", "x\u00a0y\u2003z\u3000w \u1680 \u180e", "<|endoftext|> <|user|> </s>", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀",
    "\u200b\u200d\ufeff zero", "line \u2028 next\u2029 \x85 \x1c\x1d\x1e\x1f \x00\x7f", " " * 300 + "x", "a" * 300,
    "\n" * 50,
    "\U00013460 \U0002ebf0\U000105c0 \U00010d40 \U0001e5f1", "!?!'s ''''ll 's'S", "١٢٣ \u0600 \U000e0041", "",
]  # fmt: skip


Pair = Callable[[str], tuple[Tokenizer, RuntimeTokenizer]]


@pytest.fixture
def pair(make: MAKE, tokenizers: Callable[[str], Tokenizer], tmp_path: Path) -> Pair:
    """The tokenizer of a kind, and the runtime's, read from a file."""

    def made(kind: str) -> tuple[Tokenizer, RuntimeTokenizer]:
        tokenizer = CharTokenizer("".join(HARD) + TEXT) if kind == "char" else tokenizers(kind)
        write_model(tmp_path / "a.gguf", make(config(), tokenizer), COMPACT, "F32", None)
        return tokenizer, RuntimeTokenizer(Reader(str(tmp_path / "a.gguf")))

    return made


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_ids_and_bytes_are_the_training_s(kind: str, pair: Pair) -> None:
    tokenizer, ours = pair(kind)
    for text in [*HARD, TEXT]:
        ids = tokenizer.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert b"".join(ours.bytes[i] for i in ids).decode() == text
    assert (ours.end, ours.mask) == (tokenizer.end_id, tokenizer.mask_id)
    writable = {i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids} | {tokenizer.end_id}
    assert {i for i, may in enumerate(ours.writable) if may} == writable


def test_any_text_at_all_is_split_as_tiktoken_splits_it(pair: Pair) -> None:
    tokenizer, ours = pair("gpt2")
    characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t'sdltrve0à٣中!")

    @settings(max_examples=400, deadline=None)
    @given(st.text(characters, max_size=40))
    def same(text: str) -> None:
        assert ours.encode(text) == tokenizer.encode(text)

    same()


@pytest.mark.long
def test_every_character_and_the_whole_corpus(pair: Pair) -> None:
    tokenizer, ours = pair("gpt2")
    for first in range(0, sys.maxunicode + 1, 256):
        text = "".join(f"a{chr(c)}1{chr(c)} {chr(c)}" for c in range(first, first + 256) if not 0xD800 <= c < 0xE000)
        assert ours.encode(text) == tokenizer.encode(text), hex(first)
    for piece in Shakespeare(ROOT / "data" / "archives").text():
        assert ours.encode(piece) == tokenizer.encode(piece)


def test_a_character_that_the_vocabulary_lacks_is_named(pair: Pair) -> None:
    _, ours = pair("char")
    with pytest.raises(GGUFError, match="'ж' holds a character that the model's vocabulary lacks"):
        ours.encode("ж")
