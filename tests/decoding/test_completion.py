"""Text in, text out, with real tokenizers; and acceptance by draft position."""

from __future__ import annotations

import pytest
import torch

from elara.decoding import SamplingConfig, complete, encode_prompt, measure_acceptance, writable
from elara.errors import ElaraError
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer

CHARACTERS = "abcdefgh ü€"


@pytest.fixture(scope="module")
def chars():
    return CharTokenizer(CHARACTERS)


def model_for(make_model, tokenizer, **options):
    return make_model(vocab_size=tokenizer.vocab_size + 5, **options)  # padded, as real ones are


@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_completes_text(make_model, chars, mode):
    model = model_for(make_model, chars)
    pieces: list[str] = []
    config = SamplingConfig(mode=mode, temperature=1.0, max_new_tokens=40, seed=3)
    done = complete(model, chars, "abc", config, on_text=pieces.append)
    assert "".join(pieces) == done.text
    assert set(done.text) <= set(CHARACTERS)
    ended = done.tokens < 40
    assert len(done.text) == done.tokens - ended
    assert done.tokens_per_forward == done.tokens / done.forwards
    assert done.tokens_per_forward == 1 if mode == "ar" else done.tokens_per_forward >= 1
    assert done.seconds > 0
    assert done.tokens_per_second == pytest.approx(done.tokens / done.seconds)


def test_both_modes_write_the_same_greedily(make_model, chars):
    model = model_for(make_model, chars, depth=2)
    texts = [complete(model, chars, "hag", SamplingConfig(mode=mode, temperature=0)).text for mode in ("ar", "tidar")]
    assert texts[0] == texts[1]


def test_the_end_token_ends_the_text_and_is_not_in_it(make_model, chars):
    model = model_for(make_model, chars)
    with torch.no_grad():
        model.norm.weight.zero_()  # all logits equal: greedy takes the first id that is allowed
        model.embed.weight[:] = 0
    assert complete(model, chars, "a", SamplingConfig(temperature=0, max_new_tokens=5)).text == " " * 5
    done = complete(model, chars, "a", SamplingConfig(temperature=1.0, max_new_tokens=500))
    assert done.tokens < 500
    assert len(done.text) == done.tokens - 1
    assert "\ufffd" not in done.text


def test_stop_tokens_of_the_caller_count_too(make_model, chars):
    model = model_for(make_model, chars)
    stop = chars.encode("d")
    done = complete(model, chars, "a", SamplingConfig(temperature=2.0, max_new_tokens=400, stop=stop, seed=1))
    assert done.text.endswith("d")
    assert done.text.count("d") == 1


def test_an_empty_prompt_begins_a_document(make_model, chars):
    assert encode_prompt(chars, "") == [chars.end_id]
    assert encode_prompt(chars, "ab") == chars.encode("ab")
    model = model_for(make_model, chars)
    assert complete(model, chars, "", SamplingConfig(temperature=1.0, max_new_tokens=9)).tokens > 0


def test_special_tokens_are_never_written(make_model, chars):
    allowed = writable(chars, chars.vocab_size + 5)
    assert allowed.nonzero().flatten().tolist() == [*range(len(CHARACTERS)), chars.end_id]


def test_characters_are_never_split(make_model):
    """Bytes drawn at random: what is streamed are whole characters, and the same text as all at once."""
    tokenizer = ByteTokenizer()
    model = model_for(make_model, tokenizer)
    pieces: list[str] = []
    config = SamplingConfig(temperature=3.0, max_new_tokens=300, seed=2)
    done = complete(model, tokenizer, "ü", config, on_text=pieces.append)
    assert all(pieces)
    assert "".join(pieces) == done.text


def test_refusals_pass_through(make_model, chars):
    model = model_for(make_model, chars)
    with pytest.raises(ElaraError, match="prompt 0 has 30 tokens"):
        complete(model, chars, "a" * 30, SamplingConfig())
    with pytest.raises(ElaraError, match="not in the vocabulary"):
        complete(model, chars, "Z", SamplingConfig())


def test_acceptance_by_position(make_model):
    model = make_model(depth=2)
    prompts = [[1, 2, 3], [4, 5], [6]]
    found = measure_acceptance(model, prompts, SamplingConfig(temperature=0, max_new_tokens=50), 10)
    assert len(found.reach) == 3
    assert found.offered == sorted(found.offered, reverse=True)
    assert found.accepted == sorted(found.accepted, reverse=True)
    assert all(0 <= share <= 1 for share in found.reach)
    assert found.tokens == 150
    # every forward writes one token of its own (the prompts' included) beside the accepted drafts
    assert found.tokens == found.forwards + sum(found.accepted)
    assert found.tokens_per_forward == found.tokens / found.forwards > 1


def test_acceptance_does_not_count_what_was_cut_off(make_model):
    """With one token left nothing can be accepted, so nothing is offered."""
    found = measure_acceptance(make_model(), [[1]], SamplingConfig(temperature=0, max_new_tokens=2), 10)
    assert (found.offered, found.reach) == ([0, 0, 0], [0.0, 0.0, 0.0])
