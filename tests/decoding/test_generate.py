"""Generation as a caller sees it: greedy equality, rows, windows, ends, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elara.decoding import SamplingConfig, generate
from elara.decoding.engine import Engine
from elara.decoding.generation import new_row
from elara.decoding.inference import inference
from elara.decoding.tidar import Draft, Plan
from elara.errors import ElaraError

MASK_ID = 10
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3]]
MODELS = [
    {"num_experts": 0},
    {"num_experts": 4, "every": 1},
    {"depth": 2},
    {"depth": 2, "order": "stack"},
    {"depth": 3, "order": "stack", "num_experts": 0},
    {"depth": 2, "draft_routing": "block", "chain": True},
    {"order": "stack", "every": 1, "draft_routing": "anchor", "depth": 2},
    {"num_experts": 0, "chain": True},
]


def greedy(count, **options):
    return SamplingConfig(temperature=0, max_new_tokens=count, **options)


def slow_greedy(model, prompt, count, depth=None):
    """No cache: the whole window anew for every token. The window slides as `generate` documents it."""
    text, context, window = list(prompt), model.config.model.context_length, 0
    with torch.no_grad():
        for _ in range(count):
            if len(text) - window > context:
                window = len(text) - 1 - context // 2
            hidden = model(torch.tensor([text[window:]]), depth=depth).hidden[0, -1]
            text.append(int(model.ar_head(hidden).argmax()))
    return text[len(prompt) :]


@pytest.mark.thorough(8, "slow")
@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("depth", [None, 1, 3])
def test_greedy_ar_equals_the_loop_without_a_cache(make_model, write, options, depth):
    model = make_model(**options)
    texts, _ = write(model, PROMPTS, greedy(14), depth=depth)
    assert texts == [slow_greedy(model, prompt, 14, depth) for prompt in PROMPTS]


@pytest.mark.thorough(10, "slow")
@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize(("depth", "draft_length"), [(None, None), (1, None), (3, None), (None, 2), (3, 7)])
def test_greedy_tidar_equals_greedy_ar(make_model, write, options, depth, draft_length):
    """Past the context too: 45 tokens slide the window of 24 several times, at other steps in every row."""
    model = make_model(**options)
    allowed = torch.arange(11) % 4 == 1  # few tokens, so that an untrained model's draft is right now and then
    ar, _ = write(model, PROMPTS, greedy(45), mode="ar", depth=depth, allowed=allowed)
    config = greedy(45, draft_length=draft_length)
    tidar, steps = write(model, PROMPTS, config, mode="tidar", mask_id=MASK_ID, depth=depth, allowed=allowed)
    assert tidar == ar
    accepted = sum(sum(step.accepted) for step in steps)
    offered = sum(sum(step.drafted) for step in steps)
    assert 0 < accepted < offered  # both verdicts took part


@pytest.mark.parametrize("right", [1.0, 0.8])
def test_windows_slide_alike_when_drafts_stand(make_model, right):
    """Drafts that know the greedy text: long leaps must stop at the window's end as AR does."""
    model = make_model()
    whole = [prompt + slow_greedy(model, prompt, 80) for prompt in PROMPTS]
    assert all(len(set(text[-40:])) > 1 for text in whole)
    engine = Engine(model, slots=len(PROMPTS), room=4)
    generator = torch.Generator().manual_seed(0)
    rows = [new_row(i, prompt, greedy(70), i, drafts=False) for i, prompt in enumerate(PROMPTS)]
    steps = 0
    with inference(model):
        engine.admit(list(rows))
        while engine.rows:
            for row in engine.rows:
                known = whole[row.key][len(row.text) : len(row.text) + 3]
                wrong = torch.rand(len(known), generator=generator) >= right
                row.draft = Draft([(token + int(bad)) % 10 for token, bad in zip(known, wrong, strict=True)], None)
            engine.step(Plan(4))
            engine.retire()
            steps += 1
    assert [row.text for row in rows] == [text[: len(row.text)] for row, text in zip(rows, whole, strict=True)]
    assert all(len(row.text) == len(prompt) + 70 for row, prompt in zip(rows, PROMPTS, strict=True))
    assert steps < (26 if right == 1 else 45)


@pytest.mark.parametrize("seed", range(3))
def test_tidar_that_agrees_always_takes_every_draft(make_model, write, seed):
    """A model without attention to anything: each token depends on the mask alone, so the draft is right."""
    model = make_model(seed, num_experts=0)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
        model.embed.weight[:] = model.embed.weight[0]
        model.embed.weight[:, 0] += torch.arange(11) * 1e-3  # the same token is always the likeliest
        model.diffusion.weight.copy_(model.embed.weight)
    _, steps = write(model, [[1, 2]], greedy(21), mode="tidar", mask_id=MASK_ID)
    assert [step.accepted for step in steps] == [[0], *[[3]] * 5]
    assert [len(step.tokens[0]) for step in steps] == [1, 4, 4, 4, 4, 4]


def test_a_long_text_slides_its_window(make_model, write):
    model = make_model(depth=2)
    texts, _ = write(model, PROMPTS, greedy(70))
    assert texts == [slow_greedy(model, prompt, 70) for prompt in PROMPTS]


@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_a_prompt_may_fill_the_context(make_model, write, mode):
    model = make_model()
    prompt = [i % 10 for i in range(24)]
    texts, _ = write(model, [prompt, [3]], greedy(6), mode=mode, mask_id=MASK_ID)
    assert texts == [slow_greedy(model, prompt, 6), slow_greedy(model, [3], 6)]


@pytest.mark.parametrize("mode", ["ar", "tidar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_rows_beside_it(make_model, write, mode, temperature):
    """Also not when other rows end earlier or slide their window."""
    model = make_model(depth=2)
    options = {"temperature": temperature, "max_new_tokens": 40, "stop": [2]}
    together, _ = write(model, PROMPTS, SamplingConfig(seed=7, **options), mode=mode, mask_id=MASK_ID)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = write(model, [prompt], SamplingConfig(seed=7 + row, **options), mode=mode, mask_id=MASK_ID)
        assert alone[0] == together[row]


@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_the_seed_decides_the_text(make_model, write, mode):
    model = make_model(dtype=torch.float32)
    texts: list[list[list[int]]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # the global generator has no part in it
        config = SamplingConfig(temperature=1.0, max_new_tokens=30, seed=seed, mode=mode)
        texts.append(write(model, PROMPTS, config, mask_id=MASK_ID)[0])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_rows_end_at_a_stop_token_or_their_count(make_model, write, mode):
    model = make_model()
    free, _ = write(model, PROMPTS, SamplingConfig(temperature=1.0, max_new_tokens=30), mode=mode, mask_id=MASK_ID)
    config = SamplingConfig(temperature=1.0, max_new_tokens=30, stop=[0, 7])
    texts, steps = write(model, PROMPTS, config, mode=mode, mask_id=MASK_ID)
    ends = set()
    for text, whole in zip(texts, free, strict=True):
        stops = [i for i, token in enumerate(whole) if token in (0, 7)]
        end = stops[0] + 1 if stops else 30
        assert text == whole[:end]
        ends.add(end)
    assert len(ends) > 1
    assert steps[-1].finished == [True] * 3
    for row in range(3):
        finished = [step.finished[row] for step in steps]
        assert finished == sorted(finished)
        after = steps[finished.index(True) + 1 :]
        assert all(step.tokens[row] == [] and step.drafted[row] == 0 for step in after)


@pytest.mark.parametrize("count", range(1, 8))
def test_never_more_than_max_new_tokens(make_model, write, count):
    model = make_model()
    texts, _ = write(model, PROMPTS, greedy(count), mode="tidar", mask_id=MASK_ID)
    assert [len(text) for text in texts] == [count] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_only_allowed_tokens_are_written(make_model, write, mode, temperature):
    model = make_model()
    allowed = torch.zeros(11, dtype=torch.bool)
    allowed[[1, 4, 6]] = True
    config = SamplingConfig(temperature=temperature, max_new_tokens=40)
    texts, _ = write(model, PROMPTS, config, mode=mode, mask_id=MASK_ID, allowed=allowed)
    written = {token for text in texts for token in text}
    assert written <= {1, 4, 6}
    assert temperature == 0 or len(written) == 3


def test_a_draft_of_one_token_is_ar(make_model, write):
    model = make_model()
    config = SamplingConfig(temperature=0, max_new_tokens=9, draft_length=1)
    texts, steps = write(model, PROMPTS, config, mode="tidar", mask_id=MASK_ID)
    assert texts == write(model, PROMPTS, greedy(9))[0]
    assert len(steps) == 9


def test_ar_needs_one_forward_per_token(make_model, write):
    _, steps = write(make_model(), PROMPTS, greedy(12))
    assert len(steps) == 12
    assert all(step.tokens and not any(step.accepted) for step in steps)


def test_dropout_is_off_and_the_mode_comes_back(make_model, write):
    model = make_model(dropout=0.5)
    wanted, _ = write(model, PROMPTS, greedy(10))
    model.train()
    assert write(model, PROMPTS, greedy(10))[0] == wanted
    assert model.training
    steps = generate(model, PROMPTS, greedy(10))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert model.training


def test_no_gradient_is_kept_between_steps(make_model):
    model = make_model()
    for _ in generate(model, PROMPTS, greedy(3)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_float32_and_bfloat16_models_write(make_model, write):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=dtype)
        for mode in ("ar", "tidar"):
            texts, _ = write(model, PROMPTS, greedy(30), mode=mode, mask_id=MASK_ID)
            assert [len(text) for text in texts] == [30] * 3


def test_autocast_writes_with_a_bfloat16_cache(make_model, write):
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mode in ("ar", "tidar"):
            texts, _ = write(model, PROMPTS, greedy(30), mode=mode, mask_id=MASK_ID)
            assert [len(text) for text in texts] == [30] * 3


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("there is no prompt", {"prompts": []}),
        ("prompt 1 is empty", {"prompts": [[1], []]}),
        ("prompt 0 has 25 tokens, the model's context holds 24", {"prompts": [[1] * 25]}),
        ("prompt 0 has token id 11", {"prompts": [[1, 11]]}),
        ("prompt 0 has token id -1", {"prompts": [[-1]]}),
        ("mode=guess", {"mode": "guess"}),
        ("needs mask_id", {"mode": "tidar"}),
        ("needs mask_id", {"mode": "tidar", "mask_id": 11}),
        ("depth=0", {"depth": 0}),
        ("draft_length=65 must be at most 64", {"mode": "tidar", "mask_id": MASK_ID, "draft_length": 65}),
        ("prompt 0 has 22 tokens and max_new_tokens=3", {"prompts": [[1] * 22], "overflow": "error"}),
        ("allowed must mark", {"allowed": torch.zeros(11, dtype=torch.bool)}),
        ("allowed must mark", {"allowed": torch.ones(12, dtype=torch.bool)}),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(make_model, message, change):
    options: dict[str, Any] = {"prompts": [[1]], **change}
    sampling = greedy(3, **{key: options.pop(key) for key in ("draft_length", "overflow") if key in options})
    with pytest.raises(ElaraError, match=message) as error:
        generate(make_model(), options.pop("prompts"), sampling, **options)  # not even a first step is asked for
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["tidar", "diffusion"])
def test_drafts_need_a_diffusion_head(make_model, mode):
    with pytest.raises(ElaraError, match=f"mode={mode} needs a model with a diffusion head"):
        generate(make_model(block_length=0), [[1]], greedy(3), mode=mode, mask_id=MASK_ID)


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize("length", [1, 24, 30])
def test_drafts_longer_than_the_context_or_of_nothing_are_defined(make_model, write, length):
    model = make_model(chain=True)
    config = greedy(50, draft_length=length)
    assert write(model, [[1, 2]], config, mode="tidar", mask_id=MASK_ID)[0] == write(model, [[1, 2]], greedy(50))[0]


def test_a_text_may_just_fill_the_context_where_overflow_is_an_error(make_model, write):
    model = make_model()
    texts, _ = write(model, [[1] * 21], greedy(3, overflow="error"))
    assert texts == write(model, [[1] * 21], greedy(3))[0]


@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_top_k_above_the_vocabulary_is_all_of_it(make_model, write, mode):
    model = make_model()
    wide, all_of_it = (SamplingConfig(max_new_tokens=30, top_k=k, mode=mode) for k in (10**6, None))
    assert write(model, PROMPTS, wide, mask_id=MASK_ID)[0] == write(model, PROMPTS, all_of_it, mask_id=MASK_ID)[0]
