"""A teacher's opinions in another tokenizer's tokens, against sums over the teacher's whole vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Made
from tokenizers import decoders, models, pre_tokenizers, trainers

from elara import checkpoint
from elara.backends.elara import Elara
from elara.config import ElaraConfig, ModelConfig
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from elara.tokenizer.huggingface import HuggingFaceTokenizer
from elara.training.projection import LEAST, Projection

TEXT = "The queen found a flower. The drone sleeps over honey, and bees — naïve bees — flew; über alles Blüten. "


def pieces(vocab: int) -> HuggingFaceTokenizer:
    """A byte-level BPE learned from the text."""
    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT * 3], trainer)
    return HuggingFaceTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Elara:
    """A model with random weights that are large enough for opinions."""
    tokenizer = pieces(320)
    torch.manual_seed(0)
    size = ModelConfig(n_layer=1, n_embd=32, n_head=2, hidden=32, vocab_size=384, context_length=64, init_std=0.3)
    folder = tmp_path_factory.mktemp("teacher") / "checkpoint"
    checkpoint.save(folder, ElaraLM(ElaraConfig(model=size)), tokenizer, meta={"step": 0})
    return Elara(str(folder))


def spelled(tokenizer: Tokenizer, vocab: int) -> list[bytes]:
    """The bytes of each token, from the alphabet in which a byte-level BPE writes its vocabulary."""
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = dict(zip(map(chr, printable), printable, strict=True))
    signs |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    words = {i: word for word, i in tokenizer._backend.get_vocab().items()}
    return [bytes(signs[sign] for sign in words.get(i, "")) for i in range(vocab)]


def whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def expected(teacher: Elara, words: list[bytes], text: bytes, place: int) -> np.ndarray | None:
    """Probabilities of the byte behind `text[: place + 1]` by summing over all tokens that begin as the text does."""
    tokens, end, ids = teacher.tokenizer(), 0, []
    for token in tokens.encode(text.decode()):
        if end + len(words[token]) > place + 1:
            break
        ids.append(token)
        end += len(words[token])
    if not ids or not whole(text[:end]):
        return None
    begun = text[end : place + 1]
    logits = teacher._ready().model
    with torch.no_grad():
        probabilities = logits.ar_head(logits(torch.tensor([ids])).hidden)[0, -1].double().softmax(0).numpy()
    mass, total = np.zeros(256), 0.0
    for token, word in enumerate(words):
        if word and whole(word) and word.startswith(begun):
            total += probabilities[token]
            if len(word) > len(begun):
                mass[word[len(begun)]] += probabilities[token]
    if begun and total < LEAST:
        return None
    return mass / total if begun else mass


def test_a_byte_learns_from_all_tokens_that_begin_with_it(teacher: Elara) -> None:
    text = TEXT[:60].encode()
    words = spelled(teacher.tokenizer(), 384)
    row = torch.tensor([list(text)])
    found = Projection(teacher, teacher.tokenizer(), ByteTokenizer()).opinion(row, 200, 1.0)
    known = 0
    for place in range(len(text)):
        mass = np.zeros(256)
        for token, value in zip(found.ids[0, place].tolist(), found.logprobs[0, place, :-1].tolist(), strict=True):
            if 0 <= token < 256:
                mass[token] += np.exp(value)
        wanted = expected(teacher, words, text, place)
        if wanted is None or not wanted.any():
            assert (found.ids[0, place] == -1).all() and found.logprobs[0, place, -1] == 0
            continue
        known += 1
        np.testing.assert_allclose(mass, wanted, rtol=1e-3, atol=1e-6)
        assert found.logprobs[0, place].exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert known >= 45


def test_the_same_tokenizer_changes_nothing(teacher: Elara) -> None:
    tokenizer = teacher.tokenizer()
    ids = tokenizer.encode(TEXT)[:30]
    row = torch.tensor([[*ids, tokenizer.end_id, *ids[:8]]])
    found = Projection(teacher, tokenizer, tokenizer).opinion(row, 6, 1.3)
    direct = teacher.top_logprobs(row, 384, 1.3)
    for place in range(row.shape[1]):
        said = dict(zip(direct.ids[0, place].tolist(), direct.logprobs[0, place].tolist(), strict=True))
        there = [i for i in found.ids[0, place].tolist() if i >= 0]
        if not there:  # inside of a character
            assert "\ufffd" in tokenizer.decode(row[0, : place + 1].tolist())
            continue
        assert there == [i for i in direct.ids[0, place, :6].tolist() if i < tokenizer.mask_id or i == tokenizer.end_id]
        got = found.logprobs[0, place, : len(there)].tolist()
        assert [said[i] for i in there] == pytest.approx(got, abs=1e-4)


@pytest.mark.parametrize("student", [ByteTokenizer(), CharTokenizer(set(TEXT)), pieces(280), pieces(500)])
def test_what_has_an_opinion_is_a_distribution_over_the_students_tokens(teacher: Elara, student: Tokenizer) -> None:
    ids = student.encode(TEXT[:60])
    row = torch.tensor([[*ids, student.end_id, *ids[:4]], [*ids[4:], *ids[:8], student.mask_id]])
    found = Projection(teacher, teacher.tokenizer(), student).opinion(row, 16, 0.8)
    there = (found.ids >= 0).any(-1)
    assert there.float().mean() > 0.5
    assert ((found.ids < student.vocab_size) & (found.ids >= -1)).all()
    assert torch.allclose(found.logprobs.exp().sum(-1), torch.ones(()), atol=1e-5)
    for some in found.ids.flatten(0, 1).tolist():
        real = [token for token in some if token >= 0]
        assert len(real) == len(set(real)) and some[: len(real)] == real
    assert (found.following[there][:-1] <= 1e-6).float().mean() > 0.9
    assert found.following[~there].isnan().all()


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.sampled_from("the qué—en 🐝Ωß\n"), max_size=30), cut=st.integers(0, 4))
def test_any_text_is_read_without_a_place_lost(teacher: Elara, text: str, cut: int) -> None:
    student = ByteTokenizer()
    row = list(text.encode())[cut:] or [65]  # may begin inside of a character
    found = Projection(teacher, teacher.tokenizer(), student).opinion(torch.tensor([row]), 4, 1.0)
    assert found.logprobs.isfinite().any(-1).all()
    assert torch.allclose(found.logprobs.exp().sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.slow
def test_a_student_of_bytes_learns_from_a_teacher_of_words(home, teacher: Elara, tmp_path: Path) -> None:
    command = home.tiny(
        "name=bytes", "teacher=elara", f"teachers.elara.backend.checkpoint={teacher.checkpoint}", "tokenizer=byte",
        "distill.context=64", "distill.top_k=8",
    )  # fmt: skip
    done = home.call(*command)
    assert done.returncode == 0, done.stderr
    assert "elara has another tokenizer: what it says is put into the student's tokens" in done.stdout
    values = [float(row["train/loss_elara"]) for row in home.rows(home.only_run("bytes")) if row["train/loss"]]
    assert np.mean(values[-4:]) < np.mean(values[:4])
