"""Any tokenizer.json: trained here by the `tokenizers` package in the layouts that real models use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.errors import ElaraError
from elara.tokenizer import TextError, TokenizerConfig, build, identity, load
from elara.tokenizer.huggingface import HuggingFaceTokenizer

hf = pytest.importorskip("tokenizers")

TEXT = ["To be, or not to be: that is the question.", "naïve café 日本語 👩‍👩‍👧", "a  b   c\n\nd"] * 20


def byte_level():
    """GPT-2's and Llama 3's layout."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def metaspace():
    """SentencePiece's layout: spaces as a letter, unknown characters as bytes."""
    tokens = ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    letters = sorted({c for text in TEXT for c in text.replace(" ", "▁") if c.isascii()} | {"▁"})
    vocabulary = {token: i for i, token in enumerate([*tokens, *letters])}
    model = hf.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("▁", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(path):
    return HuggingFaceTokenizer.open(str(path), "<|endoftext|>")


def streamed(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return [decoder.feed(token) for token in ids] + [decoder.flush()]


@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_byte_level_round_trip_without_truncation_padding_or_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text
    assert not set(ids) & {0, 1, *tokenizer.special_ids}


def test_special_tokens_in_text_stay_text(tokenizer):
    text = "<s>To be<|endoftext|>"
    assert 0 not in tokenizer.encode(text)
    assert 1 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_reserved_ids_follow_the_files_own(tokenizer, path):
    assert tokenizer.end_id == 0
    assert tokenizer.mask_id == tokenizer.plain_size
    assert tokenizer.vocab_size == tokenizer.plain_size + 5
    own = HuggingFaceTokenizer.open(str(path / "tokenizer.json"))
    assert own.end_id == own.vocab_size - 1 == own.plain_size + 5
    assert own.fingerprint != tokenizer.fingerprint
    assert own.decode([own.end_id, own.mask_id, *own.encode("be"), *own.role_ids.values()]) == "be"
    assert own.decode([*own.encode("be"), own.vocab_size]) == "be\ufffd"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.end_id == 0
    assert loaded.encode("or not to be") == tokenizer.encode("or not to be")


@pytest.mark.parametrize("text", ["To be, or not", "日本 to 👩 be", "a  b   c\n"])
def test_decoders_that_look_at_neighbours_stream_alike(text):
    backend = metaspace()
    tokenizer = HuggingFaceTokenizer(backend.to_str().encode())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == backend.decode(ids, skip_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_build_and_identity_follow_the_file(path, tmp_path):
    config = TokenizerConfig("huggingface", path=str(path))
    built = build(config, lambda: iter([]), cache=tmp_path)
    assert identity(config)["fingerprint"] == built.fingerprint


def test_bad_files_are_refused_in_one_line(path, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for wrong, end in ((tmp_path / "none.json", None), (tmp_path, None), (path, "<|nowhere|>")):
        with pytest.raises(ElaraError) as error:
            HuggingFaceTokenizer.open(str(wrong), end)
        assert "\n" not in str(error.value)


def letters_only(unk=None, normalizer=None):
    """A vocabulary of small letters, space, full stop and line break, and `unk` for all else."""
    names = [*"abcdefghijklmnopqrstuvwxyz .\n", *([unk] if unk else [])]
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[], unk_token=unk))
    tokenizer.decoder = hf.decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def split_at_spaces():
    tokenizer = letters_only()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("backend", "text", "position", "lost"),
    [
        (letters_only(), "a dog. λόγος ran.", 7, "'λόγος ran.'"),
        (letters_only("[UNK]"), "a dog. λόγος ran.", 7, "'[UNK]"),
        (letters_only(normalizer=hf.normalizers.Lowercase()), "a dog. The cat.", 7, "'The cat.'"),
        (letters_only(normalizer=hf.normalizers.Strip()), "a dog.\n", 6, "'' for '\\n'"),
        (letters_only(normalizer=hf.normalizers.Prepend("x")), "a dog.", 0, "'xa dog.' for 'a dog.'"),
        (split_at_spaces(), "a dog", 1, "'dog' for ' dog'"),
        (metaspace(), " to be", 0, "'to be' for ' to be'"),
    ],
)
def test_text_that_would_be_lost_is_refused_at_its_first_place(backend, text, position, lost):
    tokenizer = HuggingFaceTokenizer(backend.to_str().encode())
    assert tokenizer.decode(tokenizer.encode(text)) != text
    with pytest.raises(TextError, match=f"position {position}\\)") as error:
        tokenizer.encode_exactly(text)
    assert lost in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ElaraError, match=f"position {position} of message 2"):
        tokenizer.apply_chat([{"role": "user", "content": ""}, {"role": "user", "content": text}], exact=True)
    tokenizer.apply_chat([{"role": "user", "content": text}])  # what is asked is read as well as it can be


@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_text_that_comes_back_is_kept_with_the_same_ids(tokenizer, text):
    assert tokenizer.encode_exactly(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("cut", [2, 5, 9, 12])  # before a space and after a line break, as long texts are cut
def test_a_later_part_of_a_text_is_written_as_the_whole_is(cut):
    for backend in (metaspace(), byte_level(), letters_only()):
        tokenizer, text = HuggingFaceTokenizer(backend.to_str().encode()), "to be or\nnot a"
        parts = [tokenizer.encode_exactly(text[:cut]), tokenizer.encode_exactly(text[cut:], before=text[cut - 1])]
        assert [*parts[0].tolist(), *parts[1].tolist()] == tokenizer.encode(text)
