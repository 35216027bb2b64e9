"""Properties of the drawn mask section."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.config import TiDARConfig
from elara.model import MaskSection, draw_section

MASK_ID = 99


@st.composite
def draws(draw):
    length = draw(st.integers(1, 8))
    seq = draw(st.integers(length + 1, 60))
    config = TiDARConfig(
        block_length=length,
        block_fraction=draw(st.floats(0.01, 1.0)),
        schedule=draw(st.sampled_from(["full", "linear", "cosine"])),
    )
    return draw(st.integers(1, 3)), seq, config, draw(st.integers(0, 2**31))


def drawn(batch, seq, config, seed):
    tokens = torch.randint(90, (batch, seq), generator=torch.Generator().manual_seed(1))
    return tokens, *draw_section(tokens, config, MASK_ID, torch.Generator().manual_seed(seed))


@given(draws())
@settings(max_examples=150, deadline=None)
def test_properties(case):
    batch, seq, config, seed = case
    tokens, section, supervision = drawn(batch, seq, config, seed)
    starts, length = section.starts, config.block_length
    assert starts.min() >= 1  # a clean token stands before every block
    assert starts.max() + length <= seq
    assert (starts.diff() > 0).all()
    assert (starts.diff() % length == 0).all()  # one grid: blocks never overlap
    offset = 1 + int(starts[0] - 1) % length
    grid = len(range(offset, seq - length + 1, length))
    assert len(starts) == max(1, round(config.block_fraction * grid))
    positions = section.positions()[0]
    assert positions.tolist() == [start + i for start in starts.tolist() for i in range(length)]
    assert section.length == len(positions)
    assert torch.equal(supervision.targets, tokens[:, positions])
    hidden = section.tokens == MASK_ID
    assert torch.equal(section.tokens[~hidden], supervision.targets[~hidden])
    if config.schedule == "full":
        assert hidden.all()
        assert supervision.weights is None
    else:
        assert torch.equal(supervision.weights > 0, hidden)  # the shown ones are no task


@given(draws())
@settings(max_examples=30, deadline=None)
def test_the_generator_decides_everything(case):
    batch, seq, config, seed = case
    torch.manual_seed(seed % 7)
    _, first, one = drawn(batch, seq, config, seed)
    _, second, two = drawn(batch, seq, config, seed)
    assert torch.equal(first.starts, second.starts)
    assert torch.equal(first.tokens, second.tokens)
    assert (one.weights is None and two.weights is None) or torch.equal(one.weights, two.weights)


def test_every_offset_and_block_comes_up():
    config = TiDARConfig(block_length=4, block_fraction=0.25)
    tokens = torch.zeros(1, 20, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    starts = [int(s) for _ in range(400) for s in draw_section(tokens, config, MASK_ID, generator)[0].starts]
    assert set(starts) == set(range(1, 17))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_weights_make_the_mean_an_unbiased_estimate(schedule):
    """E[weight * hidden] is the integral of m'(t) over [0, 1], which is 1, for every token."""
    config = TiDARConfig(block_length=16, schedule=schedule)
    tokens = torch.zeros(64, 64 * 16 + 1, dtype=torch.long)
    _, supervision = draw_section(tokens, config, MASK_ID, torch.Generator().manual_seed(0))
    assert supervision.weights is not None
    assert float(supervision.weights.mean()) == pytest.approx(1.0, abs=0.03)


def test_schedules_hide_their_share():
    """linear hides half of the tokens on average, cosine 1 - 2/pi."""
    tokens = torch.zeros(64, 64 * 16 + 1, dtype=torch.long)
    for schedule, share in (("linear", 0.5), ("cosine", 1 - 2 / torch.pi)):
        config = TiDARConfig(block_length=16, schedule=schedule)
        section, _ = draw_section(tokens, config, MASK_ID, torch.Generator().manual_seed(0))
        assert float((section.tokens == MASK_ID).float().mean()) == pytest.approx(share, abs=0.02)


def test_rows_may_start_elsewhere():
    section = MaskSection(torch.tensor([[1, 5], [2, 9]]), 2, torch.zeros(2, 4, dtype=torch.long))
    assert section.positions().tolist() == [[1, 2, 5, 6], [2, 3, 9, 10]]
    assert section.length == 4
