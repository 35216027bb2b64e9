"""Building, saving and loading; fingerprints refuse what differs."""

import json

import pytest

from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig, build, check_fingerprint, identity, load
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from elara.tokenizer.gpt2 import GPT2Tokenizer


@pytest.fixture
def tokenizers(gpt2):
    return [ByteTokenizer(), CharTokenizer("naïve 日本👩\n"), gpt2]


def test_saved_tokenizers_load_alike(tokenizers, tmp_path):
    for tokenizer in tokenizers:
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load(tmp_path / tokenizer.kind)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("naïve 日") == tokenizer.encode("naïve 日")
        assert loaded.special_ids == tokenizer.special_ids


def test_fingerprints_differ_when_ids_differ(gpt2):
    fingerprints = [t.fingerprint for t in (ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("abc"), gpt2)]
    assert len(set(fingerprints)) == 4
    assert CharTokenizer("ba").fingerprint == CharTokenizer("ab").fingerprint


def test_fingerprint_is_fixed_across_versions():
    # checkpoints carry it: a change here refuses every checkpoint there is
    assert CharTokenizer("ab").fingerprint == "8f16cef7ab50fa0338f10552770bdfdeea3837b51921f6502ee34f4b10e3185c"


def test_mismatch_is_refused_in_one_line():
    have, want = CharTokenizer("ab").fingerprint, CharTokenizer("abc").fingerprint
    check_fingerprint(want, want)
    with pytest.raises(ElaraError, match="tokenizer=saved") as error:
        check_fingerprint(have, want, "this tokenizer")
    assert "\n" not in str(error.value)
    assert have[:12] in str(error.value)


def test_changed_files_are_refused(tmp_path):
    CharTokenizer("abc").save(tmp_path)
    (tmp_path / "characters.json").write_text(json.dumps("abd"))
    with pytest.raises(ElaraError, match="changed after it was saved"):
        load(tmp_path)
    (tmp_path / "characters.json").write_text('"ab')
    with pytest.raises(ElaraError, match="damaged"):
        load(tmp_path)
    (tmp_path / "characters.json").unlink()
    with pytest.raises(ElaraError, match="damaged"):
        load(tmp_path)
    with pytest.raises(ElaraError, match="no readable tokenizer"):
        load(tmp_path / "nowhere")


def test_newer_formats_are_refused(tmp_path):
    ByteTokenizer().save(tmp_path)
    file = tmp_path / "elara_tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(ElaraError, match="update Elara"):
        load(tmp_path)


def test_char_is_built_from_all_pieces(tmp_path):
    tokenizer = build(TokenizerConfig("char"), lambda: iter(["ba", "cb"]), cache=tmp_path)
    assert tokenizer.encode("abc") == [0, 1, 2]


def test_saved_kind_takes_a_checkpoints_tokenizer(tmp_path):
    CharTokenizer("abc").save(tmp_path / "checkpoint" / "tokenizer")
    for path in (tmp_path / "checkpoint", tmp_path / "checkpoint" / "tokenizer"):
        config = TokenizerConfig("saved", path=str(path))
        assert build(config, lambda: iter([]), cache=tmp_path).encode("cab") == [2, 0, 1]
        assert identity(config)["fingerprint"] == CharTokenizer("abc").fingerprint


@pytest.mark.parametrize("kind", ["chars", "saved", "huggingface"])
def test_incomplete_configurations_name_the_key(kind, tmp_path):
    for function in (identity, lambda config: build(config, lambda: iter([]), cache=tmp_path)):
        with pytest.raises(ElaraError, match=r"tokenizer\.(kind|path)"):
            function(TokenizerConfig(kind))


def test_damaged_vocabulary_is_refused(gpt2, tmp_path):
    good = gpt2._files()["vocab.bpe"]
    for bad in (good[:-100], good[:1000] + b"x" + good[1001:]):
        source = tmp_path / "vocab.bpe"
        source.write_bytes(bad)
        with pytest.raises(ElaraError, match="damaged or not the pinned file"):
            GPT2Tokenizer.fetch(tmp_path / "cache", str(source))
        assert not list((tmp_path / "cache").iterdir())
    source.write_bytes(good)
    assert GPT2Tokenizer.fetch(tmp_path / "cache", str(source)).fingerprint == gpt2.fingerprint
    (tmp_path / "cache" / "gpt2-vocab.bpe").write_bytes(good[:-1])
    with pytest.raises(ElaraError, match="delete"):
        GPT2Tokenizer.fetch(tmp_path / "cache")
