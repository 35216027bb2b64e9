"""Which answers are kept, and how far two of them lie apart."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elara import checkpoint
from elara.backends import Answer, Params
from elara.collect.config import FilterConfig
from elara.collect.disagreement import disagreement
from elara.collect.duplicates import minhash
from elara.collect.filters import Filters
from elara.collect.language import language_of, script_of
from elara.collect.prompts import Prompt
from elara.collect.store import answer_sample
from elara.collect.student import Student
from elara.config import ElaraConfig, ModelConfig
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.tokenizer.char import CharTokenizer

CONF = Path(__file__).parents[2] / "conf" / "collect.yaml"
SENTENCES = {
    "en": "The bees fly over the field and they look for what is in bloom.",
    "de": "Die Bienen fliegen über das Feld und suchen, was dort für sie blüht, und das ist nicht wenig.",
    "fr": "Les abeilles volent sur le champ et cherchent ce qui est en fleur dans les prés.",
    "es": "Las abejas vuelan por el campo y buscan lo que está en flor, pero no es mucho.",
    "it": "Le api volano sul campo e cercano quello che è in fiore, ma non è molto per la loro fame.",
    "pt": "As abelhas voam pelo campo e não encontram flores para o mel que elas dão ao homem.",
    "nl": "De bijen vliegen over het veld en zoeken wat er in bloei staat, maar dat is niet veel.",
}


def answered(text, question="?", finish="stop"):
    prompt = Prompt.of([{"role": "user", "content": question}])
    return answer_sample(prompt, Answer(text, finish), "bee", {"kind": "test"}, Params(), 1.0)


def reasons(*texts, **wanted):
    return Filters(FilterConfig(**wanted), None).reasons([answered(text, f"{i}?") for i, text in enumerate(texts)])


def test_lengths_and_cut_off_answers():
    assert reasons("", " a ", "abc", "abcd", min_chars=2, max_chars=3) == ["too_short", "too_short", None, "too_long"]
    filters = Filters(FilterConfig(cut_off=True), None)
    assert filters.reasons([answered("abc", finish="length"), answered("abc")]) == ["cut_off", None]


def test_refusals_of_the_shipped_list():


    shipped = yaml.safe_load(CONF.read_text("utf-8"))["filters"]
    refused = [
        "I'm sorry, but I can't help with that.", "I’m sorry, I do not know.", "As an AI language model, I have no",
        "I am just an AI, so", "Hello! I can't assist with that request.", "I cannot provide legal advice.",
        "I am very sorry, but no.",
    ]  # fmt: skip
    fine = [
        "She said: I'm sorry.", "An AI is a program that plays chess.", "You can't help it, the bees will come.",
        "x" * 200 + " As an AI language model", "The capital of France is Paris.",
    ]  # fmt: skip
    found = reasons(*refused, *fine, refusals=shipped["refusals"])
    assert found == ["refusal"] * len(refused) + [None] * len(fine)


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_by_their_commonest_words(language):
    assert language_of(SENTENCES[language]) == language
    found = reasons(*SENTENCES.values(), language=language)
    assert [name for name, reason in zip(SENTENCES, found, strict=True) if reason is None] == [language]


def test_what_cannot_be_told_is_kept():
    assert reasons("Paris.", "42", "print(x + y)", "", min_chars=0, language="de") == [None] * 4
    assert reasons("Пчёлы летят над полем.", "ミツバチが飛ぶ。", "蜜蜂飞过田野。", language="en") == ["language"] * 3


def test_scripts():
    texts = {"cyrillic": "Пчёлы летят", "han": "蜜蜂飞过田野", "kana": "ミツバチが飛ぶ", "greek": "οι μέλισσες",
             "latin": "bees", "hangul": "꿀벌이 난다", "arabic": "النحل يطير", "hebrew": "הדבורים"}  # fmt: skip
    assert {name: script_of(text) for name, text in texts.items()} == {name: name for name in texts}
    assert script_of("1 + 2 = 3") is None
    assert reasons(*texts.values(), language="greek").count(None) == 1


def test_exact_duplicates():
    long = "The bees fly over the field and look for flowers."
    same = [long, "the BEES fly, over the field; and look for flowers!", "Yes.", "yes", long + " Today."]
    assert reasons(*same, duplicates="exact") == [None, "duplicate", None, None, None], "short ones may come back"
    assert reasons(*same, duplicates="none") == [None] * 5
    filters = Filters(FilterConfig(duplicates="exact"), None)
    assert filters.reasons([answered("Yes."), answered("yes!")]) == [None, "duplicate"], "but not for one question"


def test_near_duplicates_are_those_with_most_triples_in_common():
    draws = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    texts = [draws.choices(words, k=100) for _ in range(300)]
    near = [[*text[:50], "other", *text[51:]] for text in texts]  # 95 of 101 triples in common
    far = [[w if draws.random() < 0.7 else "other" for w in text] for text in texts]
    found = reasons(*(" ".join(text) for text in texts + near + far))
    assert found[:300] == [None] * 300
    assert found[300:600] == ["near_duplicate"] * 300
    assert found[600:].count(None) >= 297


@given(*[st.lists(st.sampled_from("abcdefghij"), min_size=3, max_size=60)] * 2)
def test_minhash_estimates_the_share_of_common_triples(one, other):
    triples = [{tuple(text[i : i + 3]) for i in range(len(text) - 2)} for text in (one, other)]
    jaccard = len(triples[0] & triples[1]) / len(triples[0] | triples[1])
    estimate = (minhash(" ".join(one)) == minhash(" ".join(other))).mean()
    assert abs(estimate - jaccard) <= 0.22, "five standard errors of 128 draws"


@pytest.fixture
def student(tmp_path):
    """A tiny checkpoint that knows some characters."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
    config = ElaraConfig(ModelConfig(n_layer=1, n_embd=32, n_head=2, hidden=32, vocab_size=64, context_length=16))
    model = ElaraLM(config).eval()
    checkpoint.save(tmp_path / "student", model, tokenizer, meta={})
    return tmp_path / "student", model, tokenizer


def test_likelihood_under_the_student(student):
    folder, model, tokenizer = student
    texts = ["the bee flies over the field.", "a", "Ä", "zzzz qqqq."]
    found = Student(str(folder), torch.device("cpu")).nats_per_byte(texts)
    assert found[2] is None, "it has no such character"
    for text, nats in ((texts[1], found[1]), (texts[3], found[3])):  # within one window
        ids = [tokenizer.end_id, *tokenizer.encode(text)]
        with torch.no_grad():
            logprobs = model.ar_head(model(torch.tensor([ids[:-1]])).hidden)[0].log_softmax(-1)
        expected = -sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:])) / len(text.encode())
        assert nats == pytest.approx(expected, rel=1e-4)
    middle = sorted(value for value in found if value is not None)[1]
    wanted = FilterConfig(student=str(folder), min_nats=middle, max_nats=middle + 1e-6, duplicates="none")
    filters = Filters(wanted, Student(str(folder), torch.device("cpu")))
    counted = Counter(filters.reasons([answered(text) for text in texts]))
    assert counted == {None: 1, "unreadable": 1, "too_likely": 1, "too_unlikely": 1}


def test_a_student_and_its_bounds_belong_together():
    with pytest.raises(ElaraError, match="need a student"):
        FilterConfig(min_nats=1.0)
    with pytest.raises(ElaraError, match=r"needs filters\.min_nats"):
        FilterConfig(student="a")


def chrf(one, other, order=6):
    """F1 of character n-grams by the paper's formula, slowly."""
    one, other = ("".join(text.split()) for text in (one, other))
    p = r = 0.0
    counted = 0
    for n in range(1, order + 1):
        a, b = ([text[i : i + n] for i in range(len(text) - n + 1)] for text in (one, other))
        if not a and not b:
            continue
        counted += 1
        common, rest = 0, list(b)
        for gram in a:
            if gram in rest:
                rest.remove(gram)
                common += 1
        p += common / len(a) if a else 0
        r += common / len(b) if b else 0
    return 2 * p * r / (p + r) / counted if p + r else 0.0


@given(st.text("abc ", max_size=20), st.text("abc ", max_size=20))
def test_disagreement_is_what_the_formula_says(one, other):
    expected = 0.0 if one.split() == other.split() == [] else 1 - chrf(one, other)
    assert disagreement(one, other) == pytest.approx(expected, abs=1e-12)
    assert disagreement(one, other) == disagreement(other, one)
    assert disagreement(one, one) == 0


def test_disagreement_grows_with_the_distance():
    same, close, far = "The answer is 42.", "The answer is 43.", "Nobody knows"
    assert 0 == disagreement(same, same) < disagreement(same, close) < 0.4 < disagreement(same, far) < 1
    assert disagreement("abc", "xyz") == 1
