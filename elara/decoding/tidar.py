"""TiDAR decoding (arXiv 2511.08923, section 3.2): draft in parallel, verify autoregressively, in the same forward.

A text's last token t is not in the cache yet, and a draft d_1 .. d_n of the diffusion head may stand behind it. One
forward reads t and the draft behind the cache and, for some numbers j of these tokens, a group of masks that sees the
cache and the first j of them. The AR head says how many stand, a, and draws the token behind them; the masks of group a
hold the proposals for what follows that one. Without a group behind a, the next step has no draft to verify.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elara.config import SamplingConfig
from elara.decoding.sampling import draw, likeliest, marked, probabilities
from elara.model import ElaraLM, KVCache, MaskSection


@dataclass(frozen=True)
class Plan:
    """What one forward does: read `length` tokens (the last one and length - 1 of its draft), and think in a group of
    `masks` masks behind the first j of them for every j in `groups`. AR is plain autoregression."""

    length: int
    groups: tuple[int, ...] = ()
    masks: int = 0


AR = Plan(1)


@dataclass
class Draft:
    """tokens: proposals behind a row's last token. proposal: (len(tokens), vocab), what drew them; None = greedy."""

    tokens: list[int]
    proposal: Tensor | None

    @staticmethod
    def none() -> Draft:
        return Draft([], None)

    def cut(self, count: int) -> Draft:
        """The first `count` proposals."""
        return Draft(self.tokens[:count], None if self.proposal is None else self.proposal[:count])


def whole_plan(length: int) -> Plan:
    """The paper's step: `length` tokens, a group of as many masks behind every number of them."""
    return Plan(length, tuple(range(1, length + 1)), length)


def mask_groups(starts: list[list[int]], length: int, mask_id: int, device: torch.device) -> MaskSection:
    """One group of `length` masks at each of the starts, (batch, groups)."""
    tokens = torch.full((len(starts), len(starts[0]) * length), mask_id, device=device)
    shared = all(row == starts[0] for row in starts)
    return MaskSection(torch.tensor(starts[0] if shared else starts, device=device), length, tokens)


def think_and_talk(
    model: ElaraLM,
    tokens: Tensor,
    cache: KVCache,
    groups: list[int],
    length: int,
    mask_id: int | None,
    exit_threshold: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The one forward of a step: append tokens, (batch, n), with a group of masks behind the first j for j in groups.

    Returns the hidden states of the tokens, (batch, n, n_embd), and of the groups, (batch, groups, length, n_embd), or
    None without any. The cache holds all the tokens afterwards: truncate it to what was accepted.
    """
    if not groups:
        return model(tokens, cache=cache, exit_threshold=exit_threshold).hidden, None
    assert mask_id is not None
    starts = [[have + j for j in groups] for have in cache.lengths]
    section = mask_groups(starts, length, mask_id, tokens.device)
    output = model(tokens, section=section, cache=cache, exit_threshold=exit_threshold)
    assert output.mask_hidden is not None
    return output.hidden, output.mask_hidden.unflatten(1, (len(groups), length))


def draft(
    model: ElaraLM,
    last: list[int],
    group: Tensor,
    samplings: list[SamplingConfig],
    generators: list[torch.Generator],
    allowed: Tensor | None,
) -> list[Draft]:
    """Draw each row's proposals behind its last token from the masks of one group, (rows, length, n_embd).

    The group's first mask stands for the last token itself and is not read. With `tidar.chain` every proposal depends
    on the one before it. Where the head gives nan or infinite numbers, the proposal is `vocab_size`, which is no token.
    """
    if group.shape[1] == 1:
        return [Draft.none() for _ in last]
    greedy, vocab = all(sampling.temperature == 0 for sampling in samplings), model.config.vocab_size

    def draw_from(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, (rows, n), of independent logits, (rows, n, vocab), and what drew them: their own logits, like the
        tokens, if greedy, else probabilities, like the logits."""
        return likeliest(logits, allowed) if greedy else _draw(logits, samplings, generators, allowed)

    if model.chain is None:
        parts = [draw_from(model.diffusion_head(group[:, 1:]))]
    else:
        parts, previous = [], torch.tensor(last, device=group.device)
        for place in range(1, group.shape[1]):
            parts.append(draw_from(model.diffusion_head(group[:, place], previous)[:, None]))
            previous = parts[-1][0][:, 0]
            if not greedy:
                previous = previous.clamp(max=vocab - 1)  # where the head gives no numbers, there is no such row
    tokens, drawn = torch.cat([tokens for tokens, _ in parts], 1), torch.cat([drawn for _, drawn in parts], 1)
    if greedy:
        return [Draft(each, None) for each in marked(tokens, drawn, vocab).tolist()]  # the host waits once
    return [Draft(each, proposal) for each, proposal in zip(tokens.tolist(), drawn, strict=True)]


def _draw(
    logits: Tensor, samplings: list[SamplingConfig], generators: list[torch.Generator], allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, proposals = [], []
    for each, sampling, generator in zip(logits, samplings, generators, strict=True):
        proposals.append(probabilities(each, sampling, allowed))
        tokens.append(draw(proposals[-1], torch.rand(len(each), generator=generator).to(each.device)))
    return torch.stack(tokens), torch.stack(proposals)


def longest_agreement(best: list[list[int]], drafts: list[list[int]], limits: list[int]) -> list[tuple[int, int]]:
    """Greedy verification: how many tokens of each row stand, 1..limit, and the token behind them.

    best: (rows, n) ids, the most likely token behind each of the n that were read.
    """
    found = []
    for said, proposed, limit in zip(best, drafts, limits, strict=True):
        count = 1
        while count < limit and proposed[count - 1] == said[count - 1]:
            count += 1
        found.append((count, said[count - 1]))
    return found


def verify(probs: Tensor, drafted: Draft, uniform: Tensor, trusted: Tensor | None = None) -> tuple[int, int]:
    """Speculative rejection sampling (arXiv 2211.17192, algorithm 1): the text follows the AR distribution exactly.

    probs: (n + 1, vocab), the AR distribution behind the last token and each of the n proposals. uniform: (n + 1) in
    [0, 1). trusted: boolean (n, vocab), tokens that stand without a trial, which is no longer exact. Returns how many
    of the n + 1 tokens stand, and the token behind them.
    """
    ids = torch.as_tensor(drafted.tokens, device=probs.device)[:, None]
    p = probs[:-1].gather(1, ids)[:, 0]
    q = drafted.proposal.gather(1, ids)[:, 0] if drafted.proposal is not None else torch.ones_like(p)
    stands = uniform[:-1] * q < p  # u < p / q
    if trusted is not None:
        stands |= trusted.gather(1, ids)[:, 0]
    count = 1 + int(stands.long().cumprod(0).sum())
    behind = probs[count - 1]
    if count < len(probs):
        if drafted.proposal is not None:
            residual = (behind - drafted.proposal[count - 1]).clamp(min=0)
        else:
            residual = behind.index_fill(0, ids[count - 1], 0.0)
        if float(residual.sum()) > 0:  # all zeros means p = q up to rounding
            behind = residual
    return count, int(draw(behind, uniform[-1]))
