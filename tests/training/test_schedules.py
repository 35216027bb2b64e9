"""Schedules against what their papers draw: warm-up, plateau, decay, and `final` at the last step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest

from elara.training.schedules import Factor, cosine, wsd

SCHEDULES: dict[str, Callable[..., Factor]] = {
    "cosine": cosine, "wsd": partial(wsd, decay=0.6), "wsd, short decay": partial(wsd, decay=0.01)
}  # fmt: skip


@pytest.mark.parametrize("total", [1, 2, 10, 97, 2000])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_step_takes_the_final_rate(name: str, final: float, total: int) -> None:
    for warmup in {0, 1 % total, total // 4, total - 1}:
        factor = SCHEDULES[name](total, warmup=warmup, final=final)
        values = [factor(step) for step in range(total)]
        assert values[-1] == pytest.approx(final, abs=1e-12)
        assert factor(total) == factor(10 * total) == pytest.approx(final, abs=1e-12)  # a run that is prolonged by hand
        assert all(0 < value <= 1 for value in values[:-1]), (warmup, values)
        peak = max(warmup - 1, 0)
        assert values[peak:] == sorted(values[peak:], reverse=True)


def test_cosine_is_half_a_cosine_after_the_warm_up() -> None:
    factor = cosine(100, warmup=20, final=0.2)
    assert [factor(step) for step in (0, 9, 19)] == pytest.approx([1 / 20, 10 / 20, 1])
    for share in (0.25, 0.5, 0.75):
        wanted = 0.2 + 0.8 * (1 + math.cos(math.pi * share)) / 2
        assert factor(19 + round(80 * share)) == pytest.approx(wanted)


def test_wsd_decays_linearly_over_its_share_of_the_steps() -> None:
    factor = wsd(100, warmup=10, decay=0.4, final=0.5)
    assert [factor(step) for step in (0, 4, 9, 30, 59)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [factor(step) for step in (60, 79, 99)] == pytest.approx([1 - 0.5 / 40, 0.75, 0.5])


def test_wsd_without_decay_stays_at_the_full_rate() -> None:
    factor = wsd(100, warmup=10, decay=0.0, final=0.5)
    assert [factor(step) for step in (10, 99, 500)] == [1, 1, 1]


def test_a_run_that_ends_within_its_warm_up_keeps_rising() -> None:
    assert [cosine(3, warmup=10, final=0.0)(step) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
