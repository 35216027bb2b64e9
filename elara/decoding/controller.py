"""The controller: what each TiDAR step does, from running estimates of acceptance and the measured cost of a step.

On a mixture of experts a fixed draft can be slower than plain decoding: more tokens touch more experts. So every step
chooses among plans whose cost was measured on this machine, by the rate of tokens that the acceptance seen lately
promises, and plain autoregression is one of them. A budget bounds what trying may cost.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from elara.config import SamplingConfig
from elara.decoding.engine import Engine, Row
from elara.decoding.inference import inference
from elara.decoding.tidar import AR, Draft, Plan
from elara.errors import NotFinite
from elara.model import ElaraLM

MARGIN = 1.05  # what a plan must promise over plain decoding: costs are measured, not known
PRIOR, PRIOR_WEIGHT = 0.75, 2.0  # chance that a proposal stands before any was seen, and how many trials that is worth
MEMORY = 0.93  # of a trial, per trial after it: the text's character changes
FORGET = 0.98  # of all trials, per token of plain decoding: what was hopeless may be worth another look
REVIEW, PLAIN_REVIEW = 4, 32  # steps between two choices, while drafting and while not: choosing takes time as well
BURST, BURST_SECONDS = 8, 0.05  # steps that calibration takes on end, at most, and how long
START, SHARE = 1.5, 0.005  # AR steps that trying may cost: at the start, and for every token written


@dataclass
class Costs:
    """Median seconds of a whole step, by (tokens read, groups, masks per group), at one batch size."""

    seconds: dict[tuple[int, int, int], float]

    def of(self, plan: Plan) -> float:
        return self.seconds[plan.length, len(plan.groups), plan.masks]

    @property
    def lengths(self) -> list[int]:
        """Draft lengths that were measured."""
        return sorted({length for length, _, _ in self.seconds if length > 1})

    def groups(self, length: int) -> list[int]:
        """Numbers of groups that were measured at a length."""
        return sorted(count for read, count, _ in self.seconds if read == length)

    def to_list(self) -> list[list[float]]:
        return [[*key, value] for key, value in self.seconds.items()]

    @staticmethod
    def from_list(rows: Iterable[Iterable[float]]) -> Costs:
        return Costs({(int(a), int(b), int(c)): float(seconds) for a, b, c, seconds in rows})


def candidates(longest: int) -> list[Plan]:
    """The plans that are measured: lengths and numbers of groups in powers of two, drafting alone, and plain AR.

    All with groups have one behind the first token, where random drafts end: their cost holds that of the next draft.
    """
    powers = [2, 4, 8, 16, 32, 64]
    plans = [AR]
    for length in sorted({p for p in powers if p < longest} | {longest} - {1}):
        plans.append(Plan(1, (1,), length))
        counts = sorted({p for p in [1, *powers] if p < length} | {length})
        plans += [Plan(length, (1, *range(length - count + 2, length + 1)), length) for count in counts]
        plans.append(Plan(length, (), 0))
    return plans


def calibrate(
    model: ElaraLM,
    mask_id: int,
    *,
    allowed: Tensor | None = None,
    batch: int = 1,
    depth: int | None = None,
    context: int = 128,
    seconds: float = 2.0,
) -> Costs:
    """Time every candidate plan on random text of `context` tokens: in turn, 3 rounds or more, about `seconds` long.

    In a round each plan takes several steps on end, as it would when writing: what a step finds in the processor's
    cache is what the step before it left there. The rows of a batch differ in length, as requests do.
    """
    longest = model.config.tidar.block_length
    context = max(1, min(context, model.config.model.context_length // 2))
    generator = torch.Generator().manual_seed(0)
    engine = Engine(
        model,
        slots=batch,
        capacity=context + BURST * longest,
        room=longest * (longest + 1),
        mask_id=mask_id,
        allowed=allowed,
        depth=depth,
    )
    ids = torch.arange(model.config.vocab_size) if allowed is None else allowed.cpu().nonzero()[:, 0]

    def random_ids(count: int) -> list[int]:
        return ids[torch.randint(len(ids), (count,), generator=generator)].tolist()

    def burst(plan: Plan) -> float:
        """Median seconds of a step, the first aside."""
        for row, length in zip(rows, lengths, strict=True):
            row.text = row.text[:length]
        engine.cache.truncate([length - 1 for length in lengths])
        taken: list[float] = []
        while len(taken) < 2 or (len(taken) < BURST and sum(taken) < BURST_SECONDS):
            for row in rows:
                row.draft = Draft(random_ids(plan.length - 1), None)
            begin = time.perf_counter()
            engine.step(plan)
            taken.append(time.perf_counter() - begin)
            if any(row.broken for row in rows):
                raise NotFinite
        return statistics.median(taken[1:])

    greedy = SamplingConfig(temperature=0.0, max_new_tokens=1 << 30)
    lengths = [context - i % max(1, context // 2) for i in range(batch)]
    rows = [Row(i, random_ids(length), greedy, 1 << 30, generator) for i, length in enumerate(lengths)]
    times: dict[Plan, list[float]] = {plan: [] for plan in candidates(longest)}
    started = time.perf_counter()
    rounds = 0
    with inference(model):
        engine.admit(rows)
        while rounds < 4 or (time.perf_counter() - started < seconds and rounds < 40):
            for plan, taken in times.items():
                taken.append(burst(plan))
            rounds += 1
    return Costs({(p.length, len(p.groups), p.masks): statistics.median(t[1:]) for p, t in times.items()})


class Controller:
    """Chooses the plan of every step. Its choices depend on costs and drafts alone, not on the clock: with the same
    costs a seed writes the same text."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.longest = max(costs.lengths, default=1)
        plain = costs.of(AR)
        self._prices = []  # in AR steps: length, a step that only thinks, steps that verify by number of groups
        for length in costs.lengths:
            think = costs.seconds[1, 1, length] / plain
            talks = [(n, costs.seconds[length, n, length if n else 0] / plain) for n in costs.groups(length)]
            self._prices.append((length, think, talks))
        self.begin()
        self._hopeless = self._best() == (AR, AR)  # then nothing is ever tried, and nothing seen could change that

    def begin(self) -> None:
        """Forget what earlier texts were like."""
        self.stood = [PRIOR * PRIOR_WEIGHT] * self.longest  # by place in the draft: proposals that stood
        self.tried = [PRIOR_WEIGHT] * self.longest
        self.credit, self.written = 0.0, 0.0  # in AR steps; tokens per row
        self._choice = (AR, AR)
        self._stale = PLAIN_REVIEW  # steps since the choice
        self._plain = 0  # of them, steps of plain decoding that are not forgotten for yet

    def step(self, engine: Engine) -> None:
        """Move the engine on by one step of the best plan."""
        plan = self.plan(drafted=any(row.draft.tokens for row in engine.rows))
        engine.step(plan)
        self.observe(plan, engine.rows)

    def plan(self, *, drafted: bool) -> Plan:
        """What the next step does; drafted: whether there is a draft to verify."""
        if self._hopeless:
            return AR
        think, talk = self._choice
        if self._stale >= (PLAIN_REVIEW if talk == AR else REVIEW):
            self._forget()
            think, talk = self._choice = self._best(self._budget)
            self._stale = 0
        if talk == AR:
            return AR
        if drafted:
            return talk if self._risk(talk) < self._budget else AR
        return think if self._risk(think, talk) < self._budget else AR  # a draft that nothing may verify is waste

    @property
    def _budget(self) -> float:
        return self.credit + START + SHARE * self.written

    def _risk(self, *plans: Plan) -> float:
        """What these steps cost more than plain ones, in AR steps, if nothing of their drafts stands."""
        return sum(max(0.0, self.costs.of(plan) / self.costs.of(AR) - 1) for plan in plans)

    def observe(self, plan: Plan, rows: list[Row]) -> None:
        """Learn from a step: `drafted`, `accepted` and `new` of every row that was in it."""
        self._stale += 1
        if plan == AR:
            self.written += 1
            self._plain += 1
            return
        self._forget()
        for row in rows:
            for place in range(min(row.drafted, row.accepted + 1)):
                self.stood[place] = MEMORY * self.stood[place] + (place < row.accepted)
                self.tried[place] = MEMORY * self.tried[place] + 1
        tokens = sum(len(row.new) for row in rows) / len(rows)
        self.written += tokens
        self.credit = min(2 * START, self.credit + tokens - self.costs.of(plan) / self.costs.of(AR))

    def _forget(self) -> None:
        """Bring what was seen nearer to the prior, by the plain steps since."""
        keep, self._plain = FORGET**self._plain, 0
        self.stood = [PRIOR * PRIOR_WEIGHT + keep * (stood - PRIOR * PRIOR_WEIGHT) for stood in self.stood]
        self.tried = [PRIOR_WEIGHT + keep * (tried - PRIOR_WEIGHT) for tried in self.tried]

    def _best(self, budget: float = math.inf) -> tuple[Plan, Plan]:
        """The plans without and with a draft at hand that together write the most tokens per second, and whose risk is
        within the budget."""
        reach = [1.0]
        for stood, tried in zip(self.stood, self.tried, strict=True):
            reach.append(reach[-1] * (stood / tried))
        best, choice = MARGIN, None
        for length, think, talks in self._prices:
            chances = [reach[j] - reach[j + 1] for j in range(length - 1)] + [reach[length - 1]]  # that j + 1 stand
            likely = sorted(range(length), key=lambda j: -chances[j])
            tokens = sum(reach[:length])
            for count, talk in talks:
                again = sum(chances[j] for j in likely[:count])  # chance that the next step has a draft as well
                share = 1 / (2 - again)  # of the steps that verify; the others only think
                rate = (share * tokens + 1 - share) / (share * talk + (1 - share) * think)
                if rate > best and max(0.0, think - 1) + max(0.0, talk - 1) < budget:
                    best, choice = rate, (length, sorted(j + 1 for j in likely[:count]))
        if choice is None:
            return AR, AR
        length, groups = choice
        return Plan(1, (1,), length), Plan(length, tuple(groups), length if groups else 0)
