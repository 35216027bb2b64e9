"""Rows of text in flight: what is in the cache, what is drafted, and the one step that moves all of them on.

Between two steps a row's cache holds its text but for the last token, which the next forward reads together with the
draft behind it. So rows may join and leave between any two steps, in every mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from elara.config import SamplingConfig
from elara.decoding.inference import PREFILL, cache_dtype
from elara.decoding.prefix import Prefixes
from elara.decoding.sampling import draw, likeliest, marked, probabilities
from elara.decoding.tidar import AR, Draft, Plan, draft, longest_agreement, think_and_talk, verify
from elara.model import ElaraLM, KVCache


@dataclass
class Row:
    """One text. left: tokens it may still get; drafts: whether any are proposed for it, else it grows by plain
    autoregression beside rows that draft; draft: tokens proposed behind its last one, with what drew them. broken: the
    model gave nan or infinite numbers for it, which ended it; what was written last is not to be used.

    For block diffusion: block, the tokens and masks being denoised behind the text; passes, forwards left for them;
    unread, tokens at the text's end that are not in the cache.
    """

    key: int
    text: list[int]
    sampling: SamplingConfig
    left: int
    generator: torch.Generator
    drafts: bool = True
    draft: Draft = field(default_factory=Draft.none)
    new: list[int] = field(default_factory=list)  # of the last step
    drafted: int = 0  # drafted tokens put to the test in the last step
    accepted: int = 0  # how many of these stood
    block: list[int] = field(default_factory=list)
    passes: int = 0
    unread: int = 1
    broken: bool = False

    @property
    def finished(self) -> bool:
        return not self.left

    def write(self, tokens: list[int]) -> None:
        """Append tokens up to the row's end."""
        tokens = tokens[: self.left]
        stops = [i for i, token in enumerate(tokens) if token in self.sampling.stop]
        self.new = tokens[: stops[0] + 1] if stops else tokens
        self.left = 0 if stops else self.left - len(self.new)
        self.text += self.new

    def fail(self) -> None:
        """End here: there are no numbers to go on with."""
        self.broken, self.left, self.new = True, 0, []


class Engine:
    """A model, a cache of `slots` rows and the rows in it.

    capacity: tokens that a row may come to (default: the context). room: tokens and masks of the longest plan.
    mask_id: the [MASK] token, needed by plans with groups. allowed: boolean (vocab), the tokens that may be written.
    """

    def __init__(
        self,
        model: ElaraLM,
        *,
        slots: int,
        capacity: int | None = None,
        room: int = 1,
        mask_id: int | None = None,
        allowed: Tensor | None = None,
        depth: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        weight = model.embed.weight
        self.model, self.device = model, weight.device
        self.context, self.vocab = model.config.model.context_length, model.config.vocab_size
        self.mask_id = mask_id
        self.allowed = None if allowed is None else allowed.to(self.device)
        self.prefixes = prefixes
        if prefixes is not None:
            prefixes.check(model, depth)
        self.rows: list[Row] = []
        self.cache = KVCache(
            model.config,
            0,
            min(self.context, capacity or self.context) + room,
            depth=depth,
            dtype=cache_dtype(weight),
            device=self.device,
            slots=slots,
        )

    @property
    def exit_threshold(self) -> float | None:
        """Where the recursion of a step may stop: the strictest of the rows'. Prompts are always read at full depth."""
        thresholds = [row.sampling.exit_threshold for row in self.rows if row.sampling.exit_threshold is not None]
        return min(thresholds) if len(thresholds) == len(self.rows) else None

    def admit(self, rows: list[Row]) -> None:
        """Read the rows' prompts, but for their last tokens, into the cache, as much at once as they share."""
        window = self.cache.like(len(rows), max(len(row.text) for row in rows))
        held = [0] * len(rows)
        if self.prefixes is not None:
            held = [self.prefixes.fill(window, i, row.text[:-1]) for i, row in enumerate(rows)]
        self._read(window, [row.text[have:-1] for row, have in zip(rows, held, strict=True)], held)
        self.cache.extend(window)
        self.rows += rows

    def retire(self) -> list[Row]:
        """Take the finished rows out and return them."""
        done = [i for i, row in enumerate(self.rows) if row.finished]
        gone = []
        for i in reversed(done):
            if self.rows[i].broken:
                self.cache.wipe(i)  # nan would reach the next row in this slot: times a weight of 0 it is nan still
            self.cache.drop(i)
            last = self.rows.pop()
            if i < len(self.rows):
                gone.append(self.rows[i])
                self.rows[i] = last
            else:
                gone.append(last)
        return gone

    def step(self, plan: Plan = AR) -> None:
        """One forward for all rows: `new`, `drafted`, `accepted` and `broken` of every row tell what it gave."""
        self.slide([i for i, held in enumerate(self.cache.lengths) if held >= self.context])
        length = max(1, min(plan.length, 1 + max(len(row.draft.tokens) for row in self.rows)))
        groups = {j for j in plan.groups if j <= length}
        if groups and any(row.drafts and not row.draft.tokens for row in self.rows):
            groups.add(1)  # what stands of a row without a draft
        behind = sorted(groups)
        tokens = torch.tensor(
            [[row.text[-1], *(row.draft.tokens + [0] * length)[: length - 1]] for row in self.rows], device=self.device
        )
        held = self.cache.lengths
        limits = [
            max(1, min(length, 1 + len(row.draft.tokens), self.context - have, row.left))
            for row, have in zip(self.rows, held, strict=True)
        ]
        hidden, mask_hidden = think_and_talk(
            self.model, tokens, self.cache, behind, plan.masks, self.mask_id, self.exit_threshold
        )
        if all(row.sampling.temperature == 0 and not row.sampling.trust for row in self.rows):
            ids, logits = likeliest(self.model.ar_head(hidden), self.allowed)
            best = marked(ids, logits, self.vocab).tolist()
            found = longest_agreement(best, [row.draft.tokens for row in self.rows], limits)
        else:
            found = self._sample(self.model.ar_head(hidden), limits)
        self.cache.truncate([have + count for have, (count, _) in zip(held, found, strict=True)])
        wanted = []
        for row, limit, (count, token) in zip(self.rows, limits, found, strict=True):
            # a group that is there for other rows' sake is left alone: a row's text must not depend on its neighbours
            own = count in plan.groups or not row.draft.tokens
            wanted.append(count if row.drafts and own else 0)
            row.drafted, row.accepted = limit - 1, count - 1
            if token == self.vocab:
                row.fail()
            else:
                row.write([*row.draft.tokens[: count - 1], token])
        self._draft(behind, mask_hidden, wanted)

    def _sample(self, logits: Tensor, limits: list[int]) -> list[tuple[int, int]]:
        """How many tokens of each row's draft stand, and the token behind them; logits: (rows, length, vocab)."""
        found = []
        for i, (row, limit) in enumerate(zip(self.rows, limits, strict=True)):
            probs = probabilities(logits[i, :limit], row.sampling, self.allowed)
            uniform = torch.rand(limit, generator=row.generator).to(self.device)
            if limit == 1:
                found.append((1, int(draw(probs[0], uniform[0]))))
                continue
            trusted = None
            if row.sampling.trust:
                soft = probabilities(logits[i, : limit - 1], replace(row.sampling, temperature=1.0), self.allowed)
                trusted = soft >= (1 - row.sampling.trust) * soft.amax(1, keepdim=True)
            found.append(verify(probs, row.draft.cut(limit - 1), uniform, trusted))
        return found

    def _draft(self, groups: list[int], mask_hidden: Tensor | None, counts: list[int]) -> None:
        """Draw the next drafts from the groups behind what stood, 0 = none wanted; rows without a group get none."""
        for row in self.rows:
            row.draft = Draft.none()
        drawn = [i for i, count in enumerate(counts) if count in groups and self.rows[i].left > 1]
        if mask_hidden is None or not drawn:
            return
        place = [groups.index(counts[i]) for i in drawn]
        group = mask_hidden[drawn, place] if len(self.rows) > 1 else mask_hidden[0, place[0]][None]
        rows = [self.rows[i] for i in drawn]
        drafts = draft(
            self.model,
            [row.text[-1] for row in rows],
            group,
            [row.sampling for row in rows],
            [row.generator for row in rows],
            self.allowed,
        )
        for row, made in zip(rows, drafts, strict=True):
            row.draft = made
            if self.vocab in made.tokens:
                row.fail()

    def slide(self, full: list[int]) -> None:
        """Make room in these rows: the last half context of their texts, but for the last token, is read anew."""
        if not full:
            return
        half = self.context // 2
        window = self.cache.like(len(full), half)
        self._read(window, [self.rows[i].text[-half - 1 : -1] for i in full], [0] * len(full))
        self.cache.replace(full, window)
        for i in full:
            self.rows[i].unread = 1

    def _read(self, window: KVCache, texts: list[list[int]], held: list[int]) -> None:
        """Append each row's tokens behind the `held` ones of an otherwise empty cache."""
        longest = max(map(len, texts))
        tokens = torch.zeros(len(texts), longest, dtype=torch.long)
        for padded, text in zip(tokens, texts, strict=True):
            padded[: len(text)] = torch.tensor(text)  # padding stands to the right, where no earlier token looks
        window.reserve(max(held) + longest)
        window.lengths = list(held)
        for part in tokens.to(self.device).split(PREFILL, 1) if longest else []:
            self.model(part, cache=window)
        window.truncate([have + len(text) for have, text in zip(held, texts, strict=True)])
