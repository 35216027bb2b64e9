"""Block diffusion against a loop without a cache: one whole forward per pass and row."""

from __future__ import annotations

import pytest
import torch

from elara.decoding import SamplingConfig, generate
from elara.errors import ElaraError
from elara.model import MaskSection

MASK_ID = 10
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3]]
MODELS = [
    {"num_experts": 0},
    {"num_experts": 4, "every": 1, "draft_routing": "anchor"},
    {"num_experts": 4, "every": 1, "draft_routing": "block"},
    {"depth": 2, "order": "stack", "draft_routing": "token"},
    {"depth": 2, "draft_routing": "anchor", "chain": True},
]


def sampling(count, **options):
    return SamplingConfig(mode="diffusion", max_new_tokens=count, **{"temperature": 0.0, **options})


def slow_distributions(model, window, block, allowed, depth):
    """What the diffusion head says at every place of the block, left to right: softmax over tokens that may be written.

    A generator: it is sent the token proposed at each place, which a model with a chain reads at the next.
    """
    section = MaskSection(torch.tensor([len(window)]), len(block), torch.tensor([block]))
    hidden = model(torch.tensor([window]), section=section, depth=depth).mask_hidden[0]
    before = window[-1]
    for place in range(len(block)):
        logits = model.diffusion_head(hidden[place], torch.tensor(before))
        may = torch.arange(len(logits)) != MASK_ID
        if allowed is not None:
            may &= allowed
        before = yield torch.where(may, logits, -torch.inf).softmax(-1)


@torch.no_grad()
def slow_diffusion(model, prompt, config, allowed=None, depth=None):
    """Greedy block diffusion as its definition says, for one row; returns the new tokens and the number of forwards."""
    length, context = model.config.tidar.block_length, model.config.model.context_length
    text, start, forwards = list(prompt), 0, 0
    while len(text) < len(prompt) + config.max_new_tokens:
        if len(text) - start + length > context:
            start = len(text) - 1 - context // 2
        block, left = [MASK_ID] * length, config.steps or length
        wanted = min(length, len(prompt) + config.max_new_tokens - len(text))
        while True:
            said = slow_distributions(model, text[start:], block, allowed, depth)
            proposals, probs = {}, next(said)
            for place, token in enumerate(block):
                if token == MASK_ID:
                    proposals[place] = int(probs.argmax()), float(probs.max())
                try:
                    probs = said.send(proposals[place][0] if place in proposals else token)
                except StopIteration:
                    break
            ranked = sorted(proposals)
            if config.order == "confidence":
                ranked = sorted(proposals, key=lambda place: -proposals[place][1])
            count = -(-len(ranked) // left)
            left = max(1, left - 1)
            while config.confidence and count < len(ranked) and proposals[ranked[count]][1] >= config.confidence:
                count += 1
            for place in ranked[:count]:
                block[place] = proposals[place][0]
            forwards += 1
            known = [token for i, token in enumerate(block) if MASK_ID not in block[: i + 1]]
            stops = [i for i, token in enumerate(known) if token in config.stop]
            if stops:
                return text[len(prompt) :] + known[: min(stops[0] + 1, wanted)], forwards
            if len(known) >= wanted:
                text += known[:wanted]
                break
    return text[len(prompt) :], forwards


@pytest.mark.thorough(8, "slow")
@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize(
    "choices",
    [
        {"steps": 1},
        {"steps": 3},
        {"steps": 9},
        {"order": "left_to_right", "steps": 2},
        {"confidence": 0.3},
        {"confidence": 0.3, "order": "left_to_right"},
    ],
)
def test_equals_the_loop_without_a_cache(make_model, write, options, choices):
    """35 tokens are no multiple of the block of 4 and slide the window of 24, at other steps in every row."""
    model = make_model(**options)
    config = sampling(35, **choices)
    wanted = [slow_diffusion(model, prompt, config) for prompt in PROMPTS]
    texts, steps = write(model, PROMPTS, config, mask_id=MASK_ID)
    assert texts == [text for text, _ in wanted]
    assert len({tuple(text) for text in texts}) > 1
    forwards = [[step.finished[row] for step in steps].index(True) + 1 for row in range(3)]
    assert forwards == [count for _, count in wanted]
    alone, _ = write(model, PROMPTS[1:2], config, mask_id=MASK_ID)
    assert alone == texts[1:2]


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_other_depths_too(make_model, write, chain, depth):
    model, config = make_model(depth=2, chain=chain), sampling(20, steps=3)
    texts, _ = write(model, PROMPTS, config, mask_id=MASK_ID, depth=depth)
    assert texts == [slow_diffusion(model, prompt, config, depth=depth)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_stop_tokens_end_a_row_inside_a_block(make_model, write, order):
    model = make_model(3)
    free = [slow_diffusion(model, prompt, sampling(30, order=order))[0] for prompt in PROMPTS]
    stop = [free[0][5], free[2][10]]  # blocks are 4 long: neither place ends one
    config = sampling(30, order=order, stop=stop)
    wanted = [slow_diffusion(model, prompt, config)[0] for prompt in PROMPTS]
    texts, steps = write(model, PROMPTS, config, mask_id=MASK_ID)
    assert texts == wanted
    assert any(len(text) % 4 and text[-1] in stop for text in texts)
    for text, whole in zip(texts, free, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert text == (whole[: ends[0] + 1] if ends else whole)
    assert steps[-1].finished == [True] * 3


@pytest.mark.parametrize("count", range(1, 10))
def test_never_more_than_max_new_tokens(make_model, write, count):
    texts, _ = write(make_model(), PROMPTS, sampling(count, steps=2), mask_id=MASK_ID)
    assert [len(text) for text in texts] == [count] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("chain", [False, True])
def test_only_allowed_tokens_are_written_and_never_a_mask(make_model, write, temperature, chain):
    model = make_model(chain=chain)
    with torch.no_grad():
        model.diffusion.weight[MASK_ID] *= 5  # it would like to say [MASK]
    allowed = torch.zeros(11, dtype=torch.bool)
    allowed[[1, 4, 6, MASK_ID]] = True
    config = sampling(40, temperature=temperature, steps=3)
    texts, _ = write(model, PROMPTS, config, mask_id=MASK_ID, allowed=allowed)
    assert {token for text in texts for token in text} <= {1, 4, 6}
    texts, _ = write(model, PROMPTS, config, mask_id=MASK_ID)
    assert all(MASK_ID not in text for text in texts)
    assert [len(text) for text in texts] == [40] * 3


def test_steps_are_forwards_per_block(make_model, write):
    model = make_model()
    for steps, forwards in ((1, 5), (2, 10), (3, 15), (4, 20), (None, 20), (9, 20)):
        _, made = write(model, PROMPTS[:1], sampling(20, steps=steps), mask_id=MASK_ID)
        assert len(made) == forwards
    _, made = write(model, PROMPTS[:1], sampling(20, confidence=1e-9), mask_id=MASK_ID)
    assert len(made) == 5  # every proposal is that sure


def test_one_pass_samples_from_the_head(make_model, write):
    """Goodness of fit: in one step the first token follows the head's distribution, temperature and top-k in force."""
    model = make_model(num_experts=0)
    config = sampling(1, temperature=0.7, top_k=5, steps=1)
    count = 3000
    texts, _ = write(model, [[1, 2, 3]] * count, config, mask_id=MASK_ID)
    with torch.no_grad():
        said = slow_distributions(model, [1, 2, 3], [MASK_ID] * 4, None, None)
        logits = next(said).log() / 0.7
    probs = torch.where(logits >= logits.topk(5).values[-1], logits, -torch.inf).softmax(-1)
    seen = torch.bincount(torch.tensor(texts)[:, 0], minlength=11).double()
    expected = probs * count
    assert seen[expected == 0].sum() == 0
    kept = expected > 0
    assert float(((seen - expected)[kept].square() / expected[kept]).sum()) < 18.5  # chi-square, 4 degrees: p = 0.001


def test_a_chain_proposes_from_left_to_right(make_model, write):
    """One pass with a chain that says 'one more than the token before': a whole block counts up."""
    model = make_model(chain=True, num_experts=0)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
        model.embed.weight.copy_(torch.eye(11, 16) * 4)
        model.diffusion.weight.copy_(torch.eye(11, 16))
        model.chain.norm.weight.fill_(1)
        model.chain.mlp.gate_up.weight.zero_()
        model.chain.mlp.gate_up.weight[:11, 16:27] = torch.eye(11)  # gate: the token before
        model.chain.mlp.gate_up.weight[16:27, 16:27] = torch.eye(11)  # up
        model.chain.mlp.down.weight.zero_()
        model.chain.mlp.down.weight[:11, :11] = 9 * torch.eye(11).roll(1, 0)
    for order in ("confidence", "left_to_right"):
        texts, _ = write(model, [[2]], sampling(4, steps=1, order=order), mask_id=MASK_ID)
        assert texts == [[3, 4, 5, 6]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chain", [False, True])
def test_a_row_does_not_depend_on_the_rows_beside_it(make_model, write, temperature, chain):
    model = make_model(depth=2, chain=chain)
    options = {"temperature": temperature, "stop": [2], "steps": 3, "confidence": 0.9}
    together, _ = write(model, PROMPTS, sampling(40, seed=7, **options), mask_id=MASK_ID)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = write(model, [prompt], sampling(40, seed=7 + row, **options), mask_id=MASK_ID)
        assert alone[0] == together[row]


def test_a_prompt_may_fill_the_context(make_model, write):
    model, config = make_model(), sampling(6)
    prompt = [i % 10 for i in range(24)]
    texts, _ = write(model, [prompt, [3]], config, mask_id=MASK_ID)
    assert texts == [slow_diffusion(model, each, config)[0] for each in (prompt, [3])]


@pytest.mark.parametrize("draft_length", [None, 1])
@pytest.mark.parametrize("block_length", [1, 20])
def test_any_block_length_fits(make_model, write, block_length, draft_length):
    model = make_model(block_length=block_length)
    config = sampling(60, steps=2, draft_length=draft_length)
    texts, _ = write(model, PROMPTS, config, mask_id=MASK_ID)
    assert [len(text) for text in texts] == [60] * 3


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"steps=0 must be at least 1", {"steps": 0}),
        (r"confidence=0 must be in \(0, 1\]", {"confidence": 0}),
        (r"confidence=1.5", {"confidence": 1.5}),
        (r"order=random must be one of: confidence, left_to_right", {"order": "random"}),
    ],
)
def test_bad_choices_are_refused(message, change):
    with pytest.raises(ElaraError, match=message):
        sampling(3, **change)


def test_what_it_needs_is_named(make_model):
    with pytest.raises(ElaraError, match="mode=diffusion needs a model with a diffusion head"):
        generate(make_model(block_length=0), [[1]], sampling(3), mask_id=MASK_ID)
    with pytest.raises(ElaraError, match="needs mask_id"):
        generate(make_model(), [[1]], sampling(3))
    only = torch.arange(11) == MASK_ID
    with pytest.raises(ElaraError, match="other than"):
        generate(make_model(), [[1]], sampling(3), mask_id=MASK_ID, allowed=only)
