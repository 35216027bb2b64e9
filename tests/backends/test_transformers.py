"""Any model of transformers, against transformers' own logits and its own greedy generation."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elara.backends import Answer, BackendError, Params
from elara.backends.airllm import AirLLM
from elara.backends.transformers import Transformers
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig, build
from tests.backends.conftest import save_model, write_gguf

transformers: Any = pytest.importorskip("transformers")

QUESTIONS = [
    "The bee",
    "found honey. 12 bees and 3 queens flew over the flower",
    "naïve café 日本語 🐝",
    "1. one\n2.",
    "x",
]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
GREEDY = Params(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def backend(llama: Path) -> Transformers:
    return Transformers(str(llama), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def reference(llama: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)


@pytest.fixture(scope="module")
def theirs(llama: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(llama)


def texts(backend: Transformers, params: Params, chats: Any = CHATS) -> list[str]:
    found = dict(backend.answers(chats, params))
    return [
        answer.text if isinstance(answer, Answer) else str(answer)
        for _, answer in sorted(found.items(), key=lambda item: item[0])
    ]


def test_top_logprobs_are_those_of_the_reference(backend: Transformers, reference: Any) -> None:
    ids = torch.randint(5, 320, (3, 70), generator=torch.Generator().manual_seed(1))
    top = backend.top_logprobs(ids, 8)
    with torch.no_grad():
        want = reference(ids).logits.log_softmax(-1)
    assert (top.ids.dtype, top.logprobs.dtype, top.ids.shape) == (torch.int64, torch.float32, (3, 70, 8))
    torch.testing.assert_close(top.logprobs.double(), want.topk(8).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(want.gather(-1, top.ids), want.topk(8).values, atol=1e-4, rtol=0)
    following = want[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(top.following.double(), following, atol=1e-4, rtol=0)
    assert top.following.shape == (3, 69)
    for temperature in (0.25, 1.0, 3.0):
        top = backend.top_logprobs(ids, 8, temperature)
        soft = (want / temperature).log_softmax(-1)
        torch.testing.assert_close(top.logprobs.double(), soft.gather(-1, top.ids), atol=1e-4, rtol=0)
        rest = soft.scatter(-1, top.ids, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(top.rest.double(), rest, atol=1e-4, rtol=0)
        torch.testing.assert_close(top.following.double(), following, atol=1e-4, rtol=0)
    assert not top.logprobs.requires_grad and not top.logprobs.is_inference()


def test_heads_that_cap_or_scale_their_logits_are_kept(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
        "Granite": {"logits_scaling": 4.0},
    }
    for kind, options in kinds.items():
        folder = save_model(tmp_path / kind, kind=kind, **options)
        ids = torch.arange(5, 85).view(2, 40)
        top = Transformers(str(folder), device="cpu", dtype="float32").top_logprobs(ids, 320)
        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            want = model(ids).logits.log_softmax(-1)
        torch.testing.assert_close(top.logprobs, want.gather(-1, top.ids), atol=1e-5, rtol=0)
        assert (top.rest == -torch.inf).all(), "there are no other tokens"


def test_rows_it_cannot_read_are_refused(backend: Transformers) -> None:
    for ids in (torch.tensor([[5, 320]]), torch.tensor([[-1]]), torch.full((1, 97), 5)):
        with pytest.raises(BackendError, match=r"vocabulary of 320|context holds 96") as error:
            backend.top_logprobs(ids, 4)
        assert error.value.kind == "refused"


def test_greedy_answers_are_those_of_transformers(backend: Transformers, llama: Path, theirs: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for chat, text in zip(CHATS, texts(backend, GREEDY), strict=True):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        out = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=[0, 1], pad_token_id=0)
        want = theirs.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == want.rstrip("\ufffd")


@pytest.mark.parametrize("params", [GREEDY, Params(max_new_tokens=24, temperature=1.3, top_k=40, top_p=0.9, seed=5)])
def test_an_answer_is_the_same_alone_in_a_batch_and_streamed(backend: Transformers, params: Params) -> None:
    together = texts(backend, params)
    assert together == [texts(backend, params, [chat])[0] for chat in CHATS]
    assert together == ["".join(backend.generate(chat, params)) for chat in CHATS]


def test_sampling_follows_the_seed_and_leaves_the_global_state_alone(backend: Transformers) -> None:
    state = torch.get_rng_state()
    first = texts(backend, Params(max_new_tokens=16, seed=1))
    assert first == texts(backend, Params(max_new_tokens=16, seed=1))
    assert first != texts(backend, Params(max_new_tokens=16, seed=2))
    same = texts(backend, Params(max_new_tokens=16, seed=1), [CHATS[0]] * 3)
    assert len(set(same)) == 1
    Transformers(str(backend.model), device="cpu").embed(["also while loading"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_samples_have_the_frequencies_of_the_distribution(backend: Transformers, reference: Any, theirs: Any) -> None:
    """The first token of many answers, each from its own seed."""
    ids = theirs.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        probs = (reference(ids).logits[0, -1] / 0.7).softmax(-1)
    want: Counter[str] = Counter()
    for token, prob in enumerate(probs.tolist()):
        text = theirs.decode([token], skip_special_tokens=True).rstrip("\ufffd")
        want[text if text.strip() else ""] += prob
    count = 500
    have: Counter[str] = Counter()
    for seed in range(count):
        ((_, answer),) = backend.answers([CHATS[0]], Params(max_new_tokens=1, temperature=0.7, seed=seed))
        have[answer.text if isinstance(answer, Answer) else ""] += 1
    assert len(have) > 5
    for text in want:
        spread = (want[text] * (1 - want[text]) / count) ** 0.5
        assert abs(have[text] / count - want[text]) < 4.5 * spread + 2 / count, text


def test_finish_and_token_logprobs(backend: Transformers, reference: Any, theirs: Any) -> None:
    params = Params(temperature=1.0, max_new_tokens=20, seed=3, logprobs=4)
    found = [(i, answer) for i, answer in backend.answers(CHATS, params) if isinstance(answer, Answer)]
    assert len(found) > 2
    for i, answer in found:
        prompt = theirs.apply_chat_template(CHATS[i], add_generation_prompt=True, return_dict=False)
        written: list[int] = []
        for choice in answer.tokens:
            with torch.no_grad():
                want = reference(torch.tensor([prompt + written])).logits[0, -1].log_softmax(-1)
            near = (want - choice.logprob).abs().topk(5, largest=False).indices.tolist()
            token = next(j for j in near if backend._loaded().text_of(j) == choice.text)
            assert abs(float(want[token]) - choice.logprob) < 1e-4
            assert [value for _, value in choice.top] == pytest.approx(want.topk(4).values.tolist(), abs=1e-4)
            written.append(token)
        assert answer.finish == ("length" if len(written) == 20 else "stop")
        assert answer.text == theirs.decode(written, skip_special_tokens=True).rstrip("\ufffd")
    with pytest.raises(BackendError, match="logprobs=65"):
        list(backend.answers(CHATS, Params(logprobs=65)))


def test_stop_texts_end_an_answer_and_are_not_shown(backend: Transformers) -> None:
    (whole,) = texts(backend, GREEDY, CHATS[:1])
    for start, stop in ((4, 7), (3, 4), (5, 9)):
        cut = whole[start:stop]
        params = Params(temperature=0, max_new_tokens=24, stop=("never", cut), logprobs=1)
        pieces = list(backend.generate(CHATS[0], params))
        assert "".join(pieces) == whole[: whole.index(cut)]
        ((_, answer),) = backend.answers(CHATS[:1], params)
        assert isinstance(answer, Answer)
        assert (answer.text, answer.finish) == (whole[: whole.index(cut)], "stop")
        assert len("".join(token.text for token in answer.tokens[:-1])) < len(answer.text)


def test_no_piece_splits_a_character(tmp_path: Path) -> None:
    """A model that writes what stood before in the prompt, bytes of several-byte characters among it."""
    backend = Transformers(str(save_model(tmp_path / "m", seed=3)), device="cpu", dtype="float32")
    for seed in range(6):
        params = Params(temperature=2.0, max_new_tokens=40, seed=seed)
        ((_, answer),) = backend.answers(CHATS[2:3], params)
        assert isinstance(answer, Answer)
        pieces = list(backend.generate(CHATS[2], params))
        assert "".join(pieces) == answer.text
        assert not answer.text.endswith("\ufffd")


def test_what_one_conversation_lacks_ends_that_one_only(backend: Transformers) -> None:
    chats = [CHATS[0], [{"role": "tool", "content": "x"}], [{"role": "user", "content": "bee " * 200}], [], CHATS[1],
             [{"role": "user", "content": "bee \ud83d"}]]  # fmt: skip
    found = dict(backend.answers(chats, GREEDY))
    assert isinstance(found[0], Answer) and isinstance(found[4], Answer)
    for i, word in ((1, "no tools here"), (2, "context holds 96"), (3, "no last message"), (5, "half a char")):
        error = found[i]
        assert isinstance(error, BackendError)
        assert (error.kind, error.lasting) == ("unfit", False)
        assert word in str(error) and "\n" not in str(error)
    with pytest.raises(BackendError, match="context holds 96"):
        list(backend.generate(chats[2], GREEDY))


def test_an_answer_ends_where_the_context_does(backend: Transformers) -> None:
    long = [{"role": "user", "content": "bee flew " * 20}]
    ((_, answer),) = backend.answers([long], Params(temperature=1.5, max_new_tokens=500, logprobs=1, seed=1))
    assert isinstance(answer, Answer)
    assert answer.finish == "stop" or len(answer.tokens) < 96


def test_an_answer_of_nothing_is_an_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = model.model.norm.weight  # the end token's logit is the largest, or the smallest
        model.lm_head.weight[0] = -model.model.norm.weight
    model.save_pretrained(folder)
    backend = Transformers(str(folder), device="cpu", dtype="float32")
    ((_, answer),) = backend.answers(CHATS[:1], GREEDY)
    assert isinstance(answer, BackendError)
    assert answer.kind == "empty"
    with pytest.raises(BackendError, match="wrote nothing"):
        list(backend.generate(CHATS[0], GREEDY))


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Transformers(str(llama), device="cpu", dtype="float32", batch_size=5)
    want = texts(backend, GREEDY)
    model = backend._loaded().model
    forward, sizes = type(model).forward, []

    def cramped(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > limit or (len(input_ids) == 2 and len(sizes) % 5 == 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(model), "forward", cramped)
    limit = 2
    assert texts(backend, GREEDY) == want
    assert max(sizes[1:]) == 2
    limit = 0
    found = dict(backend.answers(CHATS, GREEDY))
    assert {error.kind for error in found.values() if isinstance(error, BackendError)} == {"out_of_memory"}
    assert len(found) == len(CHATS)
    with pytest.raises(BackendError, match="does not fit into memory"):
        backend.top_logprobs(torch.tensor([[5, 6]]), 2)


def test_embeddings_are_means_of_hidden_states(backend: Transformers, reference: Any) -> None:
    words = ["The bee", "", "found honey and " * 60, "naïve"]
    vectors = backend.embed(words)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for word, vector in zip(words, vectors, strict=True):
        ids = (backend.tokenizer().encode(word) or [0])[:96]
        with torch.no_grad():
            hidden = reference.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (hidden / hidden.norm()).numpy(), atol=1e-5)
    assert backend.embed([]).shape == (0, 32)


def test_a_student_with_the_same_file_has_the_same_fingerprint(
    backend: Transformers, llama: Path, tmp_path: Path
) -> None:
    student = build(TokenizerConfig("huggingface", str(llama), "<|endoftext|>"), list, cache=tmp_path)
    assert backend.fingerprint == student.fingerprint
    assert Transformers(str(llama), end_token="<|end|>").fingerprint != student.fingerprint


def test_without_a_chat_template_the_last_text_goes_on(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base", chat=False)
    backend = Transformers(str(folder), device="cpu", dtype="float32")
    ((_, answer),) = backend.answers([[{"role": "user", "content": "ignored"}, CHATS[0][0]]], GREEDY)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The bee", return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=[0, 1], pad_token_id=0)
    assert isinstance(answer, Answer)
    assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")


def test_special_tokens_that_somebody_wrote_are_plain_text(backend: Transformers, theirs: Any) -> None:
    """As in distillation, which reads a frame and the contents apart."""
    words = ["bee<|end|><|assistant|>yes", "naïve <|endoftext|>", "<|user|>"]
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), words, strict=True)]
    ids, ours = backend._loaded().prompt(chat), backend.tokenizer()
    first, *others = backend.frame(("user", "assistant", "user"))
    own = [token for text, after in zip(words, others, strict=True) for token in (*ours.encode(text), *after)]
    answering = theirs("<|assistant|>", add_special_tokens=False)["input_ids"]
    assert ids == [*first, *own, *answering]
    assert Counter(i for i in ids if i in ours.markers) == Counter([2, 1, 3, 1, 2, 1, 3]), "those of the frame alone"
    assert theirs.decode(ids) == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    harmless = [{"role": "user", "content": "bee < | end | > naïve"}]
    assert backend._loaded().prompt(harmless) == theirs.apply_chat_template(
        harmless, add_generation_prompt=True, return_dict=False
    )


def test_a_text_that_goes_on_has_no_end_that_the_tokenizer_appended(tmp_path: Path) -> None:
    import tokenizers

    folder = save_model(tmp_path / "base", chat=False)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", 4), ("<|end|>", 1)]
    )
    file.save(str(folder / "tokenizer.json"))
    backend = Transformers(str(folder), device="cpu", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text in ("The bee", "The bee<|end|> flew", ""):
        ids = [4, *backend.tokenizer().encode(text)]
        assert backend._loaded().prompt([{"role": "user", "content": text}]) == ids
    prompt = [4, *backend.tokenizer().encode("The bee")]
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=[0, 1], pad_token_id=0
    )
    ((_, answer),) = backend.answers(CHATS[:1], GREEDY)
    assert isinstance(answer, Answer)
    written = backend._theirs().decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert answer.text == written.rstrip("\ufffd")


def test_identity_changes_with_the_weights_only(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "llama"
    shutil.copytree(llama, copy)
    assert Transformers(str(copy)).identity() == Transformers(str(llama)).identity()
    save_model(copy, seed=1)
    assert Transformers(str(copy)).identity() != Transformers(str(llama)).identity()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": None}, "backend.model="),
        ({"model": "m", "dtype": "int3"}, "dtype=int3"),
        ({"model": "m", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings_are_named_at_once(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ElaraError, match=expected):
        Transformers(**options)


def test_folders_that_hold_no_model_are_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model in (
        "/nowhere/model",
        "./nowhere",
        "a name with spaces",
        str(tmp_path / "empty"),
        str(tmp_path / "no.gguf"),
    ):
        with pytest.raises(BackendError) as error:
            Transformers(model).embed(["text"])
        assert error.value.kind == "refused"
        assert "\n" not in str(error.value)


def test_a_gguf_file_is_converted_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"cache": str(cache), "device": "cpu", "dtype": "bfloat16"}
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    top = Transformers(str(file), **options).top_logprobs(ids, 5)
    assert capfd.readouterr().err.startswith("converting tiny.gguf, once")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)
    with torch.no_grad():
        want = reference(ids).logits.float().log_softmax(-1)
    torch.testing.assert_close(want.gather(-1, top.ids), top.logprobs, atol=1e-5, rtol=0)
    capfd.readouterr()
    again = Transformers(str(tmp_path), gguf_file="tiny.gguf", **options)
    assert torch.equal(again.top_logprobs(ids, 5).logprobs, top.logprobs)
    assert again.tokenizer().decode(again.tokenizer().encode("naïve 🐝")) == "naïve 🐝"
    assert capfd.readouterr().err == ""
    other = Transformers(str(write_gguf(file, seed=1)), **options).top_logprobs(ids, 5)
    assert not torch.equal(other.logprobs, top.logprobs), "another file of the same name is another model"
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 2


def test_a_gguf_file_that_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but no more than that")
    with pytest.raises(BackendError, match=r"cannot read bad\.gguf") as error:
        Transformers(str(tmp_path / "bad.gguf"), cache=str(tmp_path / "cache")).embed(["x"])
    assert "\n" not in str(error.value)
    assert [file for file in (tmp_path / "cache").iterdir() if file.is_dir()] == []


@pytest.mark.parametrize("kind", [Transformers, AirLLM])
@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_a_program_in_a_model_folder_is_refused_without_a_question(
    kind: type[Transformers], where: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(llama, folder)
    program = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    program += "from transformers import PreTrainedTokenizerFast\n"
    program += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    program += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    program += "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "own.py").write_text(program)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changes: dict[str, dict[str, Any]] = {"config.json": {"model_type": "own", "auto_map": names}}
    if where == "tokenizer":
        changes = {"tokenizer_config.json": {"tokenizer_class": "OwnTokenizer",
                                             "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}}  # fmt: skip
    for name, more in changes.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **more}))
    asked = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(BackendError, match="a program of its own, which is never run") as error:
        kind(str(folder), device="cpu").top_logprobs(torch.zeros(1, 4, dtype=torch.long), 2)
    assert "\n" not in str(error.value) and asked.tell() == 0 and not ran.exists()
