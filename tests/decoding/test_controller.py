"""The controller: never far behind plain decoding, whatever the drafts do, and quick to take what pays."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elara.decoding import Controller, Costs, SamplingConfig, calibrate
from elara.decoding.controller import MARGIN, candidates
from elara.decoding.tidar import AR, Plan

MASK_ID = 10
LENGTHS = [2, 4, 8]


def key(plan):
    return plan.length, len(plan.groups), plan.masks


def priced(price, longest=8):
    return Costs({key(plan): price(plan) for plan in candidates(longest)})


def linear(per_token, per_mask=0.0):
    """A plain step costs 1; every further token and every mask some more."""
    return priced(lambda plan: 1 + per_token * (plan.length - 1) + per_mask * plan.masks * len(plan.groups))


@dataclass
class Text:
    """As much of a row as the controller sees."""

    drafted: int = 0
    accepted: int = 0
    new: list[int] = field(default_factory=list)


def play(controller, costs, tokens, stands):
    """Write `tokens` without a model: stands() says whether a proposal stands. Returns the cost and the plans."""
    spent, written, draft, plans = 0.0, 0, 0, []
    while written < tokens:
        plan = controller.plan(drafted=bool(draft))
        limit = min(plan.length, 1 + draft, tokens - written)
        count = 1
        while count < limit and stands():
            count += 1
        groups = {*plan.groups, *([1] if plan.groups and not draft else [])}
        draft = plan.masks - 1 if count in groups else 0
        controller.observe(plan, [Text(limit - 1, count - 1, [0] * count)])
        spent += costs.of(plan)
        written += count
        plans.append(plan)
    return spent, plans


PRICES = st.one_of(
    st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 0.5)).map(lambda p: linear(*p)),
    st.lists(st.floats(0.3, 6.0), min_size=40, max_size=40).map(
        lambda prices: Costs(dict(zip(map(key, candidates(8)), [1.0, *prices], strict=False)))
    ),
)


@pytest.mark.slow
@given(PRICES, st.lists(st.booleans(), min_size=1, max_size=60), st.integers(200, 500))
@example(linear(0.05), [True] * 59 + [False] * 1, 300)
@example(linear(0.05), [True] * 30 + [False] * 30, 300)
@example(linear(0.3), [False], 200)
@settings(max_examples=150, deadline=None)
def test_no_pattern_of_acceptance_makes_it_slow(costs, pattern, tokens):
    """Also not one that promises much and then keeps nothing: at most 3 % behind plain decoding from 200 tokens on."""
    answers = itertools.cycle(pattern)
    spent, _ = play(Controller(costs), costs, tokens, lambda: next(answers))
    assert spent <= 1.03 * tokens * costs.of(AR)


@given(PRICES, st.integers(200, 400))
@settings(max_examples=50, deadline=None)
def test_nor_an_adversary_that_sees_the_plans(costs, tokens):
    """Proposals stand while little is at stake and fall as soon as the controller relies on them."""
    controller = Controller(costs)
    trust = lambda: controller.stood[0] / controller.tried[0] < 0.8  # noqa: E731
    spent, _ = play(controller, costs, tokens, trust)
    assert spent <= 1.03 * tokens * costs.of(AR)


def test_where_drafts_never_stand_it_returns_to_plain_decoding():
    costs = linear(0.1, 0.05)
    spent, plans = play(Controller(costs), costs, 400, lambda: False)
    assert plans[-100:].count(AR) > 80
    assert 400 < spent < 400 * 1.02


def test_where_drafts_are_dear_it_never_tries():
    costs = priced(lambda plan: 1.0 if plan == AR else 50.0)
    spent, plans = play(Controller(costs), costs, 200, lambda: True)
    assert set(plans) == {AR}
    assert spent == 200


@pytest.mark.parametrize(("chance", "least"), [(1.0, 4.0), (0.9, 2.4), (0.75, 1.5)])
def test_where_drafts_pay_it_takes_them(chance, least):
    costs = linear(0.03, 0.002)
    generator = torch.Generator().manual_seed(0)
    spent, plans = play(Controller(costs), costs, 600, lambda: float(torch.rand((), generator=generator)) < chance)
    assert 600 / spent > least
    assert plans[5:].count(AR) < len(plans) / 4


def test_it_follows_a_text_that_changes():
    costs = linear(0.08, 0.03)
    controller = Controller(costs)
    good, bad, again = (play(controller, costs, 300, lambda stands=stands: stands) for stands in (True, False, True))
    assert good[0] < 150
    assert bad[0] < 313  # what the good time had saved, and the budget for trying
    assert bad[1].count(AR) > 200  # it gave up
    assert again[0] < 170  # and came back


def simulated_rate(costs, think, talk, chances, steps=20_000):
    """Tokens per second by throwing dice, step by step: the reward that the controller's formula promises."""
    generator = torch.Generator().manual_seed(1)
    dice = torch.rand(steps, len(chances), generator=generator).tolist()
    seconds, tokens, drafted = 0.0, 0, False
    for throw in dice:
        plan = talk if drafted else think
        count = 1
        if drafted:
            while count < talk.length and throw[count - 1] < chances[count - 1]:
                count += 1
        seconds += costs.of(plan)
        tokens += count
        drafted = count in plan.groups
    return tokens / seconds


@pytest.mark.thorough(5, "long")
@pytest.mark.parametrize("chances", [[0.95] * 7, [0.8] * 7, [0.6] * 7, [0.3] * 7, [0.9, 0.8, 0.3, 0.2, 0.1, 0.1, 0.1]])
@pytest.mark.parametrize("longest", [4, 8])
@pytest.mark.parametrize("price", [(0.02, 0.01), (0.1, 0.0), (0.05, 0.03), (0.4, 0.1)])
def test_its_plan_is_the_best_of_all_that_were_tried_out(longest, price, chances):
    """Every length with every set of groups that has a price, simulated: none beats the one that it chooses."""
    costs = priced(lambda plan: 1 + price[0] * (plan.length - 1) + price[1] * plan.masks * len(plan.groups), longest)
    chances = chances[: longest - 1]
    controller = Controller(costs)
    controller.stood[: len(chances)] = [100 * chance for chance in chances]
    controller.tried[: len(chances)] = [100.0] * len(chances)
    chosen = controller._best()
    rates = {(AR, AR): MARGIN / costs.of(AR)}
    for length in costs.lengths:
        think = Plan(1, (1,), length)
        for count in costs.groups(length):
            for groups in itertools.combinations(range(1, length + 1), count):
                talk = Plan(length, groups, length if groups else 0)
                rates[think, talk] = simulated_rate(costs, think, talk, chances, steps=1500)
    best = sorted(rates, key=lambda plans: rates[plans])[-6:]
    exact = {plans: simulated_rate(costs, *plans, chances) if plans[0] != AR else rates[plans] for plans in best}
    mine = simulated_rate(costs, *chosen, chances) if chosen[0] != AR else rates[AR, AR]
    assert mine >= 0.985 * max(exact.values())


def test_a_new_text_begins_without_the_last_ones_memory():
    costs = linear(0.1)
    controller = Controller(costs)
    play(controller, costs, 200, lambda: True)
    controller.begin()
    fresh = Controller(costs)
    assert (controller.stood, controller.tried, controller.credit) == (fresh.stood, fresh.tried, fresh.credit)


def test_costs_survive_a_file():
    costs = linear(0.1, 0.01)
    assert Costs.from_list(costs.to_list()) == costs
    assert costs.lengths == LENGTHS
    assert costs.groups(8) == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 16])
def test_candidates_hold_whatever_a_plan_may_need(longest):
    plans = candidates(longest)
    assert plans[0] == AR
    assert len({key(plan) for plan in plans}) == len(plans)
    assert max(plan.length for plan in plans) == longest
    for plan in plans:
        assert all(1 <= j <= plan.length for j in plan.groups)
        if plan.length > 1:
            assert Plan(1, (1,), plan.length) in plans  # what thinks for it
            assert Plan(plan.length, (), 0) in plans
            assert Plan(plan.length, tuple(range(1, plan.length + 1)), plan.length) in plans


@pytest.mark.parametrize("options", [{"chain": True, "depth": 2}, {"draft_routing": "anchor", "context_length": 8}])
def test_calibration_prices_every_candidate(make_model, write, options):
    model = make_model(**options, dropout=0.3)
    model.train()
    costs = calibrate(model, MASK_ID, allowed=torch.arange(11) < 10, batch=2, seconds=0.1)
    assert model.training and not torch.is_inference_mode_enabled()
    assert set(costs.seconds) == {key(plan) for plan in candidates(4)}
    assert all(0 < seconds < 1 for seconds in costs.seconds.values())
    controller = Controller(costs)
    config = SamplingConfig(temperature=0, max_new_tokens=30)
    texts, _ = write(model, [[1, 2], [3]], config, mode="tidar", mask_id=MASK_ID, controller=controller)
    assert texts == write(model, [[1, 2], [3]], config, mode="ar")[0]


def test_costs_of_a_longer_model_do_not_overrun_the_cache(make_model, write):
    """Costs may come from elsewhere: a controller that plans longer drafts than the model was trained for."""
    model = make_model(context_length=16)
    costs = priced(lambda plan: 1.0 if plan == AR else 0.5)
    config = SamplingConfig(temperature=0, max_new_tokens=40)
    texts, steps = write(model, [[1] * 16], config, mode="tidar", mask_id=MASK_ID, controller=Controller(costs))
    assert texts == write(model, [[1] * 16], config, mode="ar")[0]
    assert max(step.drafted[0] for step in steps) > 3
