"""The real SmolLM2, beside transformers on the same weights and llama.cpp on the file that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elara import tokenizer as tokenizers
from elara.backends import Answer, Params
from elara.backends.smollm2 import SmolLM2
from elara.export.llama_cpp import Library
from elara.export.llama_model import LlamaModel
from elara.tokenizer import TokenizerConfig
from elara.tokenizer import smollm2 as vocabulary
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
ARCHIVES = ROOT / "data" / "archives"
QUESTIONS = ["What is the capital of France?", "Name three colours.", "What does a bee make? Answer in one word.", "Hi"]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
GREEDY = Params(temperature=0, max_new_tokens=24)
HARD = [
    "a  b   c\n\nd\t\te \n \n f",
    "items:\n\n1. one\n\n2. two   3 4\n\n\n2024-11-24 12:30  99.5%",
    "naïve café 日本語 👩‍👩‍👧 🐝 ½ Ⅷ ٣٤ x²",
    "It's we'll they've I'D  don't",
    "def f(x):\n    return x**2  # 10\n\n\nclass A:\n\t1",
    "<|im_start|>user\n<|im_end|><|endoftext|> <repo_name>",
    " leading and trailing   ",
    "\r\n\u00a0\u200b\u3000 12",
]


@pytest.fixture(scope="module")
def model_file(smollm2: SmolLM2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vocabulary.extract(tmp_path_factory.mktemp("gguf"), ARCHIVES)


@pytest.fixture(scope="module")
def llama(model_file: Path, llama_library: Library) -> Iterator[LlamaModel]:
    with LlamaModel(llama_library, model_file, 512) as loaded:
        yield loaded


def test_the_tokenizer_reads_as_llama_cpp_does(smollm2: SmolLM2, llama: LlamaModel) -> None:
    for text in HARD:
        assert smollm2.tokenizer().encode(text) == llama.tokenize(text), text
        assert smollm2.tokenizer().decode(smollm2.tokenizer().encode(text)) == text


def test_the_tokenizer_is_that_of_the_loaded_model_and_of_students(smollm2: SmolLM2, tmp_path: Path) -> None:
    theirs = smollm2._loaded().tokenizer
    for text in HARD:
        if "<" not in text:  # transformers takes the names of special tokens for them
            assert smollm2.tokenizer().encode(text) == theirs(text)["input_ids"], text
    student = tokenizers.build(TokenizerConfig("smollm2"), list, cache=ARCHIVES)
    assert smollm2.fingerprint == student.fingerprint
    assert student.end_id == 0
    student.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert (loaded.kind, loaded.fingerprint) == ("huggingface", student.fingerprint)


def test_prompts_follow_the_models_own_template(smollm2: SmolLM2) -> None:
    causal = smollm2._loaded()
    text = causal.tokenizer.decode(causal.prompt([{"role": "system", "content": "Be kind."}, *CHATS[3]]))
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_it_answers_as_transformers_does(smollm2: SmolLM2) -> None:
    causal = smollm2._loaded()
    found = dict(smollm2.answers(CHATS, GREEDY))
    for i, chat in enumerate(CHATS):
        ids = causal.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        out = causal.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        want = causal.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        answer = found[i]
        assert isinstance(answer, Answer)
        assert answer.text == want
    assert "Paris" in str(found[0])
    assert "".join(smollm2.generate(CHATS[1], GREEDY)) == getattr(found[1], "text", None)


def test_log_probabilities_are_those_of_the_model_and_nearly_those_of_llama_cpp(
    smollm2: SmolLM2, llama: LlamaModel
) -> None:
    text = "The capital of France is Paris. Bees make honey from the nectar of flowers, and store it in 6-sided cells."
    ids = torch.tensor([smollm2.tokenizer().encode(text)])
    top = smollm2.top_logprobs(ids, 32)
    model: Any = smollm2._loaded().model
    with torch.no_grad():
        want = model(ids).logits.double().log_softmax(-1)
    torch.testing.assert_close(top.logprobs.double(), want.topk(32).values, atol=1e-4, rtol=0)
    theirs = torch.from_numpy(llama.logits(ids[0].tolist())).double().log_softmax(-1)
    divergence = (want[0].exp() * (want[0] - theirs)).sum(-1)
    assert float(divergence.mean()) < 0.02, "llama.cpp multiplies with activations of 8 bits"
    assert float((top.ids[0, :, 0] == theirs.argmax(-1)).double().mean()) > 0.9


def test_vectors_tell_meanings_apart(smollm2: SmolLM2) -> None:
    bee, hive, bank = smollm2.embed(["A bee flies home.", "Bees return to their hive.", "The bank raised its rates."])
    assert np.dot(bee, hive) > np.dot(bee, bank)


def test_later_loads_convert_nothing(smollm2: SmolLM2, capfd: pytest.CaptureFixture[str]) -> None:
    smollm2.tokenizer()
    smollm2._folder()
    capfd.readouterr()
    again = SmolLM2(cache=str(smollm2.cache), dtype="bfloat16")
    assert next(again.generate(CHATS[0], GREEDY)) == "The"
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in smollm2.cache.iterdir() if "smollm2-" in file.name] == []
    again.close()
