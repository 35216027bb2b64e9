"""The model behind lm-eval: each of its questions against one forward per token, and its tasks without a network."""

from __future__ import annotations

import json
import math
import socket
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.utils import postprocess_generated_text

from elara.errors import ElaraError
from elara.evaluation.config import EvalConfig
from elara.evaluation.harness import FOLDER, ElaraEval, find_tasks, run_tasks
from elara.evaluation.tasks.build import build, held_out_plays

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'-&\n"  # of the model's tokenizer
LONG = "If music be the food of love, play on;\nGive me excess of it, that, surfeiting,\n"


def ask(model, kind, *arguments):
    asked = [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]
    return getattr(model, kind)(asked)


PAIRS = [
    ("ROMEO", ": what"), ("ROMEO:", " what light"), ("ROMEO: ", "what"), ("", "Two words"), (LONG, "The appetite"),
    (LONG, "e"), (LONG, "a"), (LONG, "i"), ("a", LONG), ("ROMEO", ": what"),
]  # fmt: skip


@pytest.mark.parametrize("which", ["loaded", "byte_loaded"])
@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_loglikelihood_equals_one_forward_per_token(which, batch_tokens, naive, request):
    subject = request.getfixturevalue(which)
    found = ask(ElaraEval(subject, batch_tokens=batch_tokens), "loglikelihood", *PAIRS)
    context, tokenizer = 24, subject.tokenizer
    for (before, after), (total, greedy) in zip(PAIRS, found, strict=True):
        bare = before.rstrip()  # lm-eval scores white space before the continuation with it
        read = tokenizer.encode(bare) or [tokenizer.end_id]
        targets = tokenizer.encode(before[len(bare) :] + after)
        whole, expected, all_best = [*read, *targets], 0.0, True
        for start in range(0, len(targets), context):  # only the fourth from the end is longer than a context
            stop = min(start + context, len(targets))
            window = whole[max(0, len(read) + stop - 1 - context) : len(read) + stop - 1]
            first = len(window) - (stop - start) + 1
            log_probs, best = naive(subject.model, window[:first], targets[start:stop], tokenizer.plain_size)
            expected, all_best = expected + sum(log_probs), all_best and best
        assert total == pytest.approx(expected, abs=1e-8), (before, after)
        assert greedy == all_best


def test_greedy_continuations_are_known_as_such(loaded):
    written = ask(ElaraEval(loaded), "generate_until", ("ROMEO:", {"until": [], "max_gen_toks": 8}))[0]
    other = "x" if written[-1] != "x" else "y"
    right, wrong = ask(ElaraEval(loaded), "loglikelihood", ("ROMEO:", written), ("ROMEO:", written[:-1] + other))
    assert right[1] and not wrong[1]
    assert right[0] > wrong[0]


def test_a_continuation_is_greedy_only_if_all_its_windows_are(loaded, naive):
    wrong = LONG[:24]
    read = loaded.tokenizer.encode(f"a{wrong}")[-24:]
    letters = [letter for letter in CHARACTERS if naive(loaded.model, read, loaded.tokenizer.encode(letter), 63)[1]]
    assert len(letters) == 1, "the likeliest behind the first window"
    assert not ask(ElaraEval(loaded), "loglikelihood", ("a", wrong + letters[0]))[0][1]


def test_continuations_of_one_token_share_a_forward(loaded):
    tokens = []
    handle = loaded.model.embed.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    try:
        found = ask(ElaraEval(loaded), "loglikelihood", *((LONG, letter) for letter in "abcdefgh"))
    finally:
        handle.remove()
    assert sum(tokens) == 24
    assert len(set(found)) == 8


def test_rolling_loglikelihood_is_of_the_whole_text(loaded, naive):
    found = ask(ElaraEval(loaded, batch_tokens=50), "loglikelihood_rolling", (LONG,), ("ROMEO",), ("",), (LONG[:25],))
    for text, total in zip((LONG, "ROMEO", "", LONG[:25]), found, strict=True):
        ids, expected = loaded.tokenizer.encode(text), 0.0
        for start in range(0, len(ids), 24):
            end = min(start + 24, len(ids))
            before = [loaded.tokenizer.end_id, *ids][max(0, end - 24) : start + 1]
            expected += sum(naive(loaded.model, before, ids[start:end])[0])
        assert total == pytest.approx(expected, abs=1e-8)


@torch.no_grad()
def greedy(loaded, prompt, new, until):
    """Greedy text by whole forwards: until a stop, the end token or `new` tokens; no longer than the context."""
    tokenizer, model = loaded.tokenizer, loaded.model
    banned = [tokenizer.mask_id, *tokenizer.role_ids.values(), *range(tokenizer.vocab_size, model.config.vocab_size)]
    ids = list(prompt)
    for _ in range(new):
        logits = model.ar_head(model(torch.tensor([ids])).hidden[0, -1])
        logits[banned] = -math.inf
        token = int(logits.argmax())
        if token == tokenizer.end_id:
            break
        ids.append(token)
    return postprocess_generated_text(tokenizer.decode(ids[len(prompt) :]), until, None)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_generate_until_writes_greedy_text_up_to_a_stop(loaded, batch_tokens):
    contexts = ["ROMEO:", "a", "What light", LONG, "To be, or not", ""]
    free = [greedy(loaded, loaded.tokenizer.encode(c)[-12:] or [loaded.tokenizer.end_id], 12, []) for c in contexts]
    untils = [[], [free[1][5:7]], free[2][3:4], [free[3][2:5], free[3][4]], ["QQ"], []]
    asked = [(c, {"until": until, "max_gen_toks": 12}) for c, until in zip(contexts, untils, strict=True)]
    found = ask(ElaraEval(loaded, batch_tokens=batch_tokens), "generate_until", *asked)
    stops = [[until] if isinstance(until, str) else until for until in untils]
    assert found == [postprocess_generated_text(text, stop, None) for text, stop in zip(free, stops, strict=True)]
    assert len({len(text) for text in found}) > 2


def test_sampling_is_asked_for(loaded):
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    cold = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 5.0}
    sampled, plain = ask(ElaraEval(loaded), "generate_until", ("ROMEO:", hot), ("ROMEO:", cold))
    assert sampled != plain
    assert plain == greedy(loaded, loaded.tokenizer.encode("ROMEO:"), 12, [])


def test_an_answer_longer_than_the_context_goes_on(loaded):
    found = ask(ElaraEval(loaded), "generate_until", (LONG, {"until": [], "max_gen_toks": 60}))[0]
    assert len(found) == 60


def test_the_chat_template_is_the_tokenizers(loaded):
    model, tokenizer = ElaraEval(loaded), loaded.tokenizer
    chat = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Who, there?\n"}]
    assert model.tok_encode(model.apply_chat_template(chat)) == tokenizer.apply_chat(chat, generate=True)[0]
    prefilled = [*chat, {"role": "assistant", "content": "Nay"}]
    rendered = model.apply_chat_template(prefilled, add_generation_prompt=False)
    assert model.tok_encode(rendered) == tokenizer.apply_chat(prefilled)[0][:-1], "open, to be continued"
    text = "no reserved id in here"
    assert model.tok_encode(text) == tokenizer.encode(text)


def test_characters_that_the_tokenizer_lacks_are_named(loaded):
    with pytest.raises(ElaraError, match="model cannot read a task's text: character '7'"):
        ask(ElaraEval(loaded), "loglikelihood", ("7", "a"))


def read(task):
    """The shipped items."""
    return [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_the_shipped_tasks_need_no_network_and_count_right(loaded, naive, capfd):
    wanted = EvalConfig(tasks=["shakespeare_cloze", "shakespeare_rolling", "copying"], task_limit=6)
    found = run_tasks(loaded, wanted)
    right = 0
    for item in read("shakespeare_cloze")[:6]:
        totals = [total for total, _ in ask(ElaraEval(loaded), "loglikelihood",
                                            *((item["context"], choice) for choice in item["choices"]))]  # fmt: skip
        right += totals.index(max(totals)) == item["answer"]
    assert found["shakespeare_cloze"]["acc"] == pytest.approx(right / 6)
    texts = [item["text"] for item in read("shakespeare_rolling")[:6]]
    nats = -sum(ask(ElaraEval(loaded), "loglikelihood_rolling", *((text,) for text in texts)))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["shakespeare_rolling"]["bits_per_byte"] == pytest.approx(bits)
    assert found["copying"]["exact_match"] == 0
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("no_network")
def test_ones_own_tasks_come_from_a_folder(loaded, tmp_path):
    written = ask(ElaraEval(loaded), "generate_until", ("a", {"until": [], "max_gen_toks": 5}))[0]
    rows = [{"q": "a", "a": written}, {"q": "a", "a": "not this"}]
    (tmp_path / "rows.py").write_text(
        f"from datasets import Dataset\n\n\ndef load(**_):\n    return {{'test': Dataset.from_list({rows!r})}}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function rows.load\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs: {until: [], max_gen_toks: 5}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    found = run_tasks(loaded, EvalConfig(tasks=["mine"], task_folder=str(tmp_path)))
    assert found["mine"]["exact_match"] == 0.5
    assert found["mine"]["exact_match_stderr"] > 0


@pytest.mark.slow
def test_few_shot_examples_and_the_chat_template_reach_the_model(byte_loaded):
    seen = []
    handle = byte_loaded.model.embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten()))
    try:
        run_tasks(byte_loaded, EvalConfig(tasks=["copying"], task_limit=2, chat=True))
    finally:
        handle.remove()
    assert byte_loaded.tokenizer.role_ids["assistant"] in torch.cat(seen).tolist()


@pytest.mark.long  # lm-eval reads its own ten thousand task files
def test_an_unknown_task_is_one_line():
    with pytest.raises(ElaraError, match=r"there is no 'nope'; with Elara come copying, shakespeare_cloze"):
        find_tasks(["copying", "nope"])
    assert "hellaswag" in find_tasks(["hellaswag"]).all_tasks


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ElaraError, match=r"eval\.task_folder=.* is not a folder"):
        find_tasks(["copying"], str(tmp_path / "none"))


@pytest.mark.slow
def test_the_items_are_those_of_the_held_out_plays():
    plays = held_out_plays()
    made = build(plays)
    for task, items in made.items():
        assert read(task) == items
        assert len(items) == len({json.dumps(item) for item in items})
    whole = "".join(plays)
    for item in made["shakespeare_cloze"]:
        assert whole.count(item["context"] + item["choices"][item["answer"]] + "\n") >= 1
        assert len(set(item["choices"])) == 4
    assert {item["answer"] for item in made["shakespeare_cloze"]} == {0, 1, 2, 3}


@pytest.mark.slow  # imports transformers, which is in no extra of ours
def test_lm_evals_own_model_class_gives_the_same(loaded):
    """The same weights behind `HFLM`, lm-eval's reference, on the same requests."""
    transformers: Any = pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    from lm_eval.models.huggingface import HFLM

    class Wrapped(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.elara = loaded.model
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, input_ids, **_):
            return transformers.modeling_outputs.CausalLMOutput(logits=self.elara.ar_head(self.elara(input_ids).hidden))

    tokenizer = loaded.tokenizer
    vocabulary = {character: i for i, character in enumerate(tokenizer.characters)} | {"<end>": tokenizer.end_id}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[^\0]"), "isolated")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", pad_token="<end>")
    reference = HFLM(
        pretrained=Wrapped(transformers.PretrainedConfig(architectures=["Wrapped"])),
        tokenizer=wrapped, max_length=24, batch_size=4, device="cpu", dtype=torch.float64,
        logits_cache=False,  # it mistakes equal inputs with continuations of other lengths for each other
    )  # fmt: skip
    pairs = [pair for pair in PAIRS if len(pair[1]) <= 24]
    for kind, asked in (("loglikelihood", pairs), ("loglikelihood_rolling", [(LONG,), ("ROMEO",), (LONG[:25],)])):
        theirs, ours = ask(reference, kind, *asked), ask(ElaraEval(loaded), kind, *asked)
        assert [t[0] if isinstance(t, tuple) else t for t in ours] == pytest.approx(
            [t[0] if isinstance(t, tuple) else t for t in theirs], abs=1e-4
        )
