"""Diffusion loss by place, acceptance, and speed of the modes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from elara.evaluation.drafts import diffusion_loss, held_out_prompts, measure_drafts
from elara.evaluation.loss import cut_windows
from elara.evaluation.scoring import Request
from elara.evaluation.speed import measure_speed
from elara.model import MaskSection, draw_section


@torch.no_grad()
def test_diffusion_loss_equals_one_forward_per_block(loaded):
    model, length, mask = loaded.model, 4, loaded.tokenizer.mask_id
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(60, (n,), generator=generator).tolist() for n in (24, 24, 11, 5)]
    draws, totals, blocks = torch.Generator().manual_seed(0), torch.zeros(length, dtype=torch.float64), 0
    for row in rows[:3]:  # the last is too short for a block
        tokens = torch.tensor([row])
        for start in draw_section(tokens, model.config.tidar, mask, draws)[0].starts.tolist():
            section = MaskSection(torch.tensor([start]), length, torch.full((1, length), mask))
            hidden = model(tokens[:, :start], section=section).mask_hidden[0]
            logits = model.diffusion_head(hidden, tokens[0, start - 1 : start + length - 1])
            totals -= logits.log_softmax(1)[torch.arange(length), tokens[0, start : start + length]]
            blocks += 1
    found = diffusion_loss(model, [Request(tuple(row), (1,)) for row in rows], mask)
    assert found == pytest.approx((totals / blocks).tolist(), abs=1e-9)
    assert diffusion_loss(model, [Request((1, 2), (3,))], mask) == []


def test_prompts_come_from_everywhere(loaded, text):
    prompts = held_out_prompts(text, loaded.tokenizer, 6, 5)
    assert [loaded.tokenizer.decode(prompt) for prompt in prompts] == [
        passage[start : start + 5] for passage in text.passages for start in (0, len(passage) // 2)
    ]


def test_every_token_is_counted(loaded, text):
    windows = cut_windows(text, loaded.tokenizer, 24, None, "model")
    prompts = held_out_prompts(text, loaded.tokenizer, 6, 5)
    done: list[int] = []
    found = measure_drafts(loaded.model, loaded.tokenizer, windows, prompts, [0.0, 1.0], 12, advance=done.append)
    assert sum(done) == 3
    assert found.prompts == 6
    assert len(found.diffusion_loss) == 4
    for one in found.acceptance:
        assert one.tokens <= 6 * 12
        assert one.tokens_per_forward == one.tokens / one.forwards >= 1
        assert len(one.reach) == 3
        assert all(0 <= b <= a <= 1 for a, b in pairwise(one.reach))
    assert [one.temperature for one in found.acceptance] == [0, 1]


@pytest.mark.slow
def test_speed_has_all_modes_in_all_precisions(loaded, make_loaded, text):
    plain = make_loaded(block=0)
    prompts = [held_out_prompts(text, loaded.tokenizer, 4, 5)] * 2
    done: list[int] = []
    twice = {"float32": loaded, "again": loaded}
    found = measure_speed([twice, {"float32": plain}], prompts, 6, rounds=3, batch=2, advance=done.append)
    assert sum(done) == 4
    ways = [[(speed.mode, speed.precision) for speed in own] for own in found]
    assert ("ar", "float32") in ways[0] and ("tidar", "again") in ways[0]
    assert ways[1] == [("ar", "float32")]
    single = measure_speed([twice, {"float32": plain}], prompts, 6, rounds=1, batch=2)
    for own, once in zip(found, single, strict=True):
        ar = once[0].tokens_per_second
        assert own[0].against_ar == 1
        assert own[0].tokens_per_forward == 1
        assert [speed.against_ar for speed in once] == pytest.approx([speed.tokens_per_second / ar for speed in once])
        assert all(speed.low <= speed.tokens_per_second <= speed.high for speed in own)
