"""A checkpoint of our own as a backend: what it gives is what decoding and the model's head give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elara import checkpoint
from elara.backends import Answer, BackendError, Params
from elara.backends.elara import Elara
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.decoding import SamplingConfig, complete
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("abc", "a", "bca bca", "ROMEO: ", "cab")]
GREEDY = Params(temperature=0, max_new_tokens=20)


def saved(folder: Path, tokenizer: Tokenizer, **meta: object) -> Path:
    torch.manual_seed(0)
    vocab = -(-tokenizer.vocab_size // 64) * 64
    config = ElaraConfig(
        ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=48, vocab_size=vocab, context_length=64, init_std=0.3),
        MoEConfig(num_experts=4),
        TRMConfig(depth=2),
        TiDARConfig(block_length=4),
    )
    return checkpoint.save(folder / "step-1", ElaraLM(config), tokenizer, meta={"step": 1, **meta})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"), CharTokenizer("abc :\nROMEO"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("chat"), ByteTokenizer(), chat=True)


@pytest.mark.slow
def test_a_model_without_chat_continues_the_last_message(plain: Path) -> None:
    loaded, backend = checkpoint.load(plain), Elara(str(plain), device="cpu", batch_size=2)
    found = dict(backend.answers(CHATS, GREEDY))
    for i, chat in enumerate(CHATS):
        sampling = SamplingConfig(temperature=0, max_new_tokens=20)
        want = complete(loaded.model, loaded.tokenizer, chat[-1]["content"], sampling)
        answer = found[i]
        if not want.text.strip():
            assert isinstance(answer, BackendError) and answer.kind == "empty"
            continue
        assert isinstance(answer, Answer)
        assert (answer.text, answer.finish) == (want.text, "length" if want.tokens == 20 else "stop")
        assert "".join(backend.generate(chat, GREEDY)) == want.text
    assert any(isinstance(answer, Answer) for answer in found.values())
    backend.close()


@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_a_chat_model_answers_by_its_template(chatty: Path, mode: str) -> None:
    backend, tokenizer = Elara(str(chatty), device="cpu", mode=mode), ByteTokenizer()
    model = checkpoint.load(chatty).model
    found = dict(backend.answers(CHATS, GREEDY))
    for i, chat in enumerate(CHATS):
        ids, _ = tokenizer.apply_chat(chat, generate=True)
        written: list[int] = []
        writable = torch.arange(model.config.vocab_size) < tokenizer.vocab_size
        writable[[tokenizer.mask_id, *tokenizer.role_ids.values()]] = False
        with torch.no_grad():
            while len(written) < 20 and (not written or written[-1] != tokenizer.end_id):
                logits = model.ar_head(model(torch.tensor([ids + written])).hidden)[0, -1]
                written.append(int(logits.masked_fill(~writable, -torch.inf).argmax()))
        text = tokenizer.decode(written)
        answer = found[i]
        have = answer.text if isinstance(answer, Answer) else ""
        assert have.rstrip("\ufffd") == text.rstrip("\ufffd")  # the last character may be cut off
    bad = [[{"role": "wizard", "content": "x"}], [], [{"role": "user", "content": "x" * 80}]]
    kinds = [answer.kind for _, answer in backend.answers(bad, GREEDY) if isinstance(answer, BackendError)]
    assert kinds == ["unfit"] * 3
    backend.close()


def test_sampled_answers_follow_the_seed_alone(plain: Path) -> None:
    backend = Elara(str(plain), device="cpu")
    params = Params(temperature=1.0, max_new_tokens=16, seed=3)
    first = dict(backend.answers(CHATS, params))
    assert {str(v) for v in first.values()} == {str(v) for v in dict(backend.answers(CHATS, params)).values()}
    alone = [dict(backend.answers([chat], params))[0] for chat in CHATS]
    assert [str(first[i]) for i in range(len(CHATS))] == [str(answer) for answer in alone]
    assert [str(v) for v in first.values()] != [
        str(v) for v in dict(backend.answers(CHATS, replace(params, seed=4))).values()
    ]
    backend.close()


def test_log_probabilities_are_those_of_the_head(plain: Path) -> None:
    backend, loaded = Elara(str(plain), device="cpu"), checkpoint.load(plain)
    ids = torch.randint(0, 15, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = loaded.model.ar_head(loaded.model(ids).hidden).log_softmax(-1)
    top = backend.top_logprobs(ids, 5)
    torch.testing.assert_close(top.logprobs, want.topk(5).values)
    torch.testing.assert_close(want.gather(-1, top.ids), top.logprobs)
    assert not top.logprobs.requires_grad and not top.logprobs.is_inference()
    for bad in (torch.tensor([[64]]), torch.zeros(1, 65, dtype=torch.long)):
        with pytest.raises(BackendError, match=r"vocabulary of 64|context holds 64"):
            backend.top_logprobs(bad, 3)
    params = Params(temperature=1.0, max_new_tokens=100, logprobs=3, seed=1)
    ((_, answer),) = backend.answers([CHATS[2]], params)
    assert isinstance(answer, Answer)
    assert "".join(token.text for token in answer.tokens) == answer.text
    prompt = loaded.tokenizer.encode("bca bca")
    written = loaded.tokenizer.encode(answer.text)
    with torch.no_grad():
        want = loaded.model.ar_head(loaded.model(torch.tensor([prompt + written])).hidden).log_softmax(-1)[0]
    for place, (token, choice) in enumerate(zip(written, answer.tokens, strict=True), len(prompt) - 1):
        assert choice.logprob == pytest.approx(float(want[place, token]), abs=1e-4)
        assert [value for _, value in choice.top] == pytest.approx(want[place].topk(3).values.tolist(), abs=1e-4)
    backend.close()


def test_stop_texts(plain: Path) -> None:
    backend = Elara(str(plain), device="cpu")
    params = Params(temperature=1.0, max_new_tokens=30, seed=2)
    ((_, whole),) = backend.answers([CHATS[0]], params)
    assert isinstance(whole, Answer)
    stop = whole.text[4:6]
    ((_, cut),) = backend.answers([CHATS[0]], replace(params, stop=(stop,), logprobs=1))
    assert isinstance(cut, Answer)
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)], "stop")
    assert "".join(token.text for token in cut.tokens) == cut.text
    assert "".join(backend.generate(CHATS[0], replace(params, stop=(stop,)))) == cut.text
    backend.close()


def test_an_answer_that_nobody_waits_for_is_not_written_on(plain: Path) -> None:
    backend = Elara(str(plain), device="cpu", batch_size=2)
    endless = Params(temperature=1.0, max_new_tokens=10**6)
    writing = backend.generate(CHATS[2], endless)
    next(writing)
    del writing
    answers = backend.answers(CHATS, Params(temperature=1.0, max_new_tokens=3))
    next(answers)
    del answers  # returns at once
    assert len(list(backend.answers(CHATS, GREEDY))) == len(CHATS)
    backend.close()


def test_vectors_fingerprint_and_identity(plain: Path, chatty: Path) -> None:
    backend, loaded = Elara(str(plain), device="cpu"), checkpoint.load(plain)
    texts = ["abc", "", "a", "bca " * 40]
    vectors = backend.embed(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = (loaded.tokenizer.encode(text) or [loaded.tokenizer.end_id])[:64]
        with torch.no_grad():
            mean = loaded.model(torch.tensor([ids])).hidden[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert backend.fingerprint == loaded.tokenizer.fingerprint
    assert backend.identity() == Elara(str(plain)).identity()
    assert backend.identity()["revision"] != Elara(str(chatty)).identity()["revision"]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"precision": "f8"}, "precision=f8"), ({"mode": "fast"}, "mode=fast"), ({"batch_size": 0}, "0")],
)
def test_bad_settings_are_named_at_once(options: dict[str, object], word: str) -> None:
    with pytest.raises(ElaraError, match=word):
        Elara(**options)  # type: ignore[arg-type]
    with pytest.raises(ElaraError, match="no checkpoint at 'nowhere'"):
        _ = Elara("nowhere").fingerprint
