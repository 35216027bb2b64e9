"""Weights that are no numbers end what they would write, whatever the mode, and nothing else."""

import itertools

import pytest
import torch

from elara.decoding import SamplingConfig, Server, generate
from elara.errors import NotFinite

MASK_ID, BROKEN = 10, 9
OTHERS = torch.arange(11) < BROKEN  # what may be written: logits of the others are nobody's concern


def spoiled(make_model, part, value=float("nan"), **options):
    model = make_model(**options)
    with torch.no_grad():
        if part == "embedding":
            model.embed.weight[BROKEN, 3] = value
        elif part == "diffusion":
            model.diffusion.weight[2] = value
        else:
            model.norm.weight[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("temperature", "extra"), [(0.0, {}), (0.8, {}), (1.3, {"top_k": 3, "top_p": 0.7}), (1e-310, {})]
)
@pytest.mark.parametrize(("mode", "chain"), [("ar", False), ("tidar", False), ("tidar", True), ("diffusion", False)])
def test_no_mode_writes_from_logits_that_are_no_numbers(make_model, mode, chain, temperature, extra, value):
    model = spoiled(make_model, "norm", value, chain=chain)
    sampling = SamplingConfig(mode=mode, temperature=temperature, max_new_tokens=6, **extra)
    with pytest.raises(NotFinite, match="nan or infinite"):
        list(generate(model, [[1, 2], [3]], sampling, mask_id=MASK_ID))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("mode", ["tidar", "diffusion"])
def test_nor_from_drafts_that_are_none(make_model, mode, chain, temperature):
    model = spoiled(make_model, "diffusion", chain=chain)
    with pytest.raises(NotFinite):
        list(generate(model, [[1, 2]], SamplingConfig(mode=mode, temperature=temperature), mask_id=MASK_ID))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_prompt_that_meets_a_broken_row_of_the_embedding_is_refused(make_model, write, temperature, value):
    model = spoiled(make_model, "embedding", value)
    sampling = SamplingConfig(mode="ar", temperature=temperature, max_new_tokens=5)
    with pytest.raises(NotFinite):
        list(generate(model, [[1, BROKEN, 2]], sampling, allowed=OTHERS))
    assert len(write(model, [[1, 2]], sampling, allowed=OTHERS)[0][0]) == 5  # what never meets it is sound


@pytest.mark.parametrize("mode", ["ar", "tidar"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_server_fails_that_request_alone(make_model, write, mode, temperature):
    """Requests beside it and those that get its slot afterwards write what they write alone."""
    model = spoiled(make_model, "embedding", depth=2)
    sampling = SamplingConfig(mode=mode, temperature=temperature, max_new_tokens=12)
    sound, broken = [[1], [4, 2, 6], [3, 3]], [2, BROKEN, 5, 5, 7, 1, 2, 3, 4, 5, 6, 7]
    wanted = [write(model, [prompt], sampling, allowed=OTHERS, mask_id=MASK_ID)[0][0] for prompt in sound]
    with Server(model, slots=3, mask_id=MASK_ID, allowed=OTHERS) as server:
        for order in list(itertools.permutations([*sound, broken]))[::5]:
            streams = [(prompt, server.submit(prompt, sampling)) for prompt in order]
            for prompt, stream in streams:
                if prompt == broken:
                    with pytest.raises(NotFinite):
                        list(stream)
                else:
                    assert list(stream) == wanted[sound.index(prompt)]
