"""Prompts that share a beginning: it is read once, and the text is the same as without."""

from __future__ import annotations

import pytest
import torch

from elara.decoding import Prefixes, SamplingConfig, generate
from elara.decoding.inference import PREFILL
from elara.errors import ElaraError

MASK_ID = 10
HEAD = [1, 2, 3, 4, 5, 6, 7, 8]


class Reading:
    """Counts the clean tokens that a model is fed, row by row, while it is watched."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.register_forward_pre_hook(self.count)

    def count(self, model, args):
        self.tokens += args[0].numel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def read(model, prompts, **options):
    """Tokens fed to the model up to the first new token of each row, which costs one more each."""
    with Reading(model) as reading:
        next(generate(model, prompts, SamplingConfig(max_new_tokens=1), mode="ar", **options))
    return reading.tokens - len(prompts)


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize("mode", ["ar", "tidar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{"depth": 2, "chain": True}, {"every": 1, "draft_routing": "anchor"}])
def test_the_text_is_the_same(make_model, write, mode, temperature, options):
    """Also past the context, and beside prompts that share less, or nothing."""
    model = make_model(**options)
    prompts = [[*HEAD, 9, 3], [*HEAD[:3], 0, 0], [9, 9], HEAD, [HEAD[0]], [*HEAD, *HEAD, *HEAD]]
    prefixes = Prefixes(model)
    prefixes.remember(HEAD)
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=40, seed=3)
    wanted, _ = write(model, prompts, sampling, mode=mode, mask_id=MASK_ID)
    for _ in range(2):  # what one text wrote must not have touched what is kept
        texts, _ = write(model, prompts, sampling, mode=mode, mask_id=MASK_ID, prefixes=prefixes)
        assert texts == wanted


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ([*HEAD, 9, 3], 1),  # the last token of a prompt is read by the first step
        (HEAD, 0),
        ([*HEAD[:3], 0, 0, 0], 2),
        ([9, *HEAD], 8),
        ([HEAD[0]], 0),
    ],
)
def test_only_the_rest_is_read(make_model, prompt, rest):
    model = make_model()
    prefixes = Prefixes(model)
    with Reading(model) as reading:
        prefixes.remember(HEAD)
        prefixes.remember(HEAD)
    assert reading.tokens == len(HEAD)
    assert read(model, [prompt], prefixes=prefixes) == rest
    assert read(model, [prompt]) == len(prompt) - 1


def test_a_longer_beginning_goes_on_from_a_shorter_one(make_model, write):
    model = make_model(depth=2)
    prefixes = Prefixes(model)
    prefixes.remember(HEAD)
    longer = [*HEAD, 9, 9, 0]
    with Reading(model) as reading:
        prefixes.remember(longer)
    assert reading.tokens == 3
    assert read(model, [[*longer, 5]], prefixes=prefixes) == 0
    sampling = SamplingConfig(max_new_tokens=20)
    assert write(model, [[*longer, 5]], sampling, prefixes=prefixes)[0] == write(model, [[*longer, 5]], sampling)[0]


def test_the_one_used_longest_ago_goes_first(make_model):
    model = make_model()
    prefixes = Prefixes(model, limit=2)
    a, b, c = [1] * 6, [2] * 6, [3] * 6
    prefixes.remember(a)
    prefixes.remember(b)
    assert read(model, [[*a, 5]], prefixes=prefixes) == 0  # now b is the older one
    prefixes.remember(c)
    assert len(prefixes) == 2
    assert [read(model, [[*one, 5]], prefixes=prefixes) for one in (a, b, c)] == [0, 6, 0]


def test_one_may_fill_the_context(make_model, write):
    model = make_model()
    whole = [i % 10 for i in range(24)]
    prefixes = Prefixes(model)
    prefixes.remember(whole)
    sampling = SamplingConfig(temperature=0, max_new_tokens=30)
    assert write(model, [whole], sampling, prefixes=prefixes)[0] == write(model, [whole], sampling)[0]
    assert read(model, [whole], prefixes=prefixes) == 0


def test_it_is_read_in_parts_without_dropout(make_model, write):
    model = make_model(dropout=0.5, context_length=2 * PREFILL)
    model.train()
    head = [i * i % 10 for i in range(PREFILL + 3)]
    prefixes = Prefixes(model)
    prefixes.remember(head)
    assert model.training
    sampling = SamplingConfig(max_new_tokens=20)
    assert read(model, [[*head, 1]], prefixes=prefixes) == 0
    assert write(model, [[*head, 1]], sampling, prefixes=prefixes)[0] == write(model, [[*head, 1]], sampling)[0]


def test_autocast_keeps_it_in_its_dtype(make_model, write):
    model = make_model(dtype=torch.float32)
    prefixes = Prefixes(model)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prefixes.remember(HEAD)
        assert len(write(model, [[*HEAD, 1]], sampling, prefixes=prefixes)[0][0]) == 20


def test_another_depth_is_another_reading(make_model, write):
    model = make_model(depth=2)
    prefixes = Prefixes(model, depth=3)
    prefixes.remember(HEAD)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    wanted, _ = write(model, [[*HEAD, 1]], sampling, depth=3)
    assert write(model, [[*HEAD, 1]], sampling, depth=3, prefixes=prefixes)[0] == wanted
    with pytest.raises(ElaraError, match="the prefixes were read at depth 3, this text is at depth 2"):
        generate(model, [[9]], sampling, prefixes=prefixes)  # before the first step, whether one matches or not


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        ("a prefix has 25 tokens: give 1 to 24", [1] * 25),
        ("a prefix has 0 tokens", []),
        ("a prefix has token id 11", [1, 11]),
        ("a prefix has token id -1", [-1]),
    ],
)
def test_what_cannot_be_remembered_is_refused(make_model, message, tokens):
    prefixes = Prefixes(make_model())
    with pytest.raises(ElaraError, match=message) as error:
        prefixes.remember(tokens)
    assert "\n" not in str(error.value)
    assert len(prefixes) == 0


def test_a_limit_and_a_model_are_checked(make_model):
    with pytest.raises(ElaraError, match="limit=0 must be at least 1"):
        Prefixes(make_model(), limit=0)
    with pytest.raises(ElaraError, match="another model"):
        generate(make_model(), [[1]], SamplingConfig(), prefixes=Prefixes(make_model()))
