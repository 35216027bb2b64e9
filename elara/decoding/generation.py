"""The generation loop: rows of tokens in, steps of new tokens out, by any mode.

A text longer than the context goes on in a sliding window: when the cache holds `context_length` tokens, the last half
of them is read anew. When that happens depends on the length of the text alone, so every mode writes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from elara.decoding.ar import decode_one, prefill
from elara.decoding.config import MODES, SamplingConfig
from elara.decoding.sampling import Uniforms, draw, probabilities
from elara.decoding.tidar import Draft, draft, mask_groups, think_and_talk, verify
from elara.errors import ElaraError
from elara.model import ElaraLM, KVCache


@dataclass
class Step:
    """What one forward gave. tokens: new tokens of each row; drafted, accepted: how many drafted tokens were put to the
    test and how many of these stood (0 in `ar` and while a prompt is read); finished: rows that are at their end."""

    tokens: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    finished: list[bool]


def generate(
    model: ElaraLM,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    *,
    mode: str | None = None,
    allowed: Tensor | None = None,
    mask_id: int | None = None,
    depth: int | None = None,
) -> Iterator[Step]:
    """Continue every prompt until a stop token (which is emitted) or `max_new_tokens`; one Step per forward.

    prompts: token ids, 1 to context_length of each, of any lengths. mode: default `sampling.mode`. allowed: boolean
    (vocab), the tokens that may be written; default all. mask_id: the [MASK] token, needed by tidar. depth: recursion
    depth, default the trained one. Both modes draw from the same distribution; at temperature 0 they write the same.
    Raises ElaraError, before the first step, for prompts, ids or a mode that this model cannot serve.
    """
    mode = mode or sampling.mode
    _check(model, prompts, mode, allowed, mask_id, depth)
    rows = _Rows(model, prompts, sampling, allowed, depth)
    return rows.run_tidar(mask_id) if mode == "tidar" and mask_id is not None else rows.run_ar()


class _Rows:
    """The texts of one call, their windows and the cache that holds them."""

    def __init__(
        self,
        model: ElaraLM,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        allowed: Tensor | None,
        depth: int | None,
    ) -> None:
        self.model, self.sampling = model, sampling
        weight = model.embed.weight
        self.device = weight.device
        self.allowed = None if allowed is None else allowed.to(self.device)
        self.context = model.config.model.context_length
        self.length = sampling.draft_length or model.config.tidar.block_length
        self.texts = [list(prompt) for prompt in prompts]
        self.left = [sampling.max_new_tokens for _ in prompts]
        self.uniforms = Uniforms(sampling.seed, len(prompts), self.device)
        longest = min(self.context, max(map(len, prompts)) + sampling.max_new_tokens)
        dtype = _cache_dtype(weight)
        self.cache = KVCache(
            model.config, len(prompts), longest + self.length * (self.length + 1), depth=depth, dtype=dtype, device=self.device
        )

    @torch.inference_mode()
    def run_ar(self) -> Iterator[Step]:
        with _evaluating(self.model):
            logits, _ = prefill(self.model, self.texts, self.cache)
            while True:
                tokens = draw(self._probabilities(logits), self.uniforms.draw(1)[:, 0])
                none = [0] * len(self.texts)
                step = self._emit(tokens[:, None].tolist(), none, none)
                yield step
                if all(step.finished):
                    return
                self._slide()
                logits = decode_one(self.model, tokens, self.cache)
                self._keep(self.cache.lengths)

    @torch.inference_mode()
    def run_tidar(self, mask_id: int) -> Iterator[Step]:
        with _evaluating(self.model):
            drafted, step = self._start(mask_id)
            yield step
            while not all(step.finished):
                self._slide()
                drafted, step = self._advance(drafted, mask_id)
                yield step

    def _start(self, mask_id: int) -> tuple[Draft, Step]:
        """Read the prompts; the AR head gives one token of each row, one group of masks the draft behind it."""
        section = mask_groups([[len(text)] for text in self.texts], self.length, mask_id, self.device)
        logits, mask_hidden = prefill(self.model, self.texts, self.cache, section)
        assert mask_hidden is not None
        uniform = self.uniforms.draw(self.length)
        first = draw(self._probabilities(logits), uniform[:, 0])
        none = [0] * len(self.texts)
        drafted = draft(self.model, first, mask_hidden, self.sampling, uniform[:, 1:], self.allowed)
        return drafted, self._emit(first[:, None].tolist(), none, none)

    def _advance(self, drafted: Draft, mask_id: int) -> tuple[Draft, Step]:
        """Verify a draft and make the next one, in one forward."""
        held = self.cache.lengths
        rooms = [min(self.context - have, left) for have, left in zip(held, self.left, strict=True)]
        limits = [max(1, min(self.length, room)) for room in rooms]
        logits, groups = think_and_talk(self.model, drafted.tokens, self.cache, mask_id)
        uniform = self.uniforms.draw(2 * self.length - 1)
        limit = torch.tensor(limits, device=self.device)
        stood, behind = verify(self._probabilities(logits), drafted, limit, uniform[:, : self.length])
        counts = stood.tolist()
        self._keep([have + count for have, count in zip(held, counts, strict=True)])
        group = groups[torch.arange(len(groups), device=self.device), stood - 1]  # (batch, L, n_embd)
        following = draft(self.model, behind, group, self.sampling, uniform[:, self.length :], self.allowed)
        drafts = zip(drafted.tokens.tolist(), counts, behind.tolist(), strict=True)
        new = [[*tokens[1:count], token] for tokens, count, token in drafts]
        return following, self._emit(new, [limit - 1 for limit in limits], [count - 1 for count in counts])

    def _probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.sampling, self.allowed)

    def _emit(self, new: list[list[int]], drafted: list[int], accepted: list[int]) -> Step:
        """Append each row's tokens up to its end."""
        step = Step([], [], [], [])
        for row, tokens in enumerate(new):
            open_ = self.left[row] > 0
            tokens = tokens[: self.left[row]]
            stops = [i for i, token in enumerate(tokens) if token in self.sampling.stop]
            if stops:
                tokens = tokens[: stops[0] + 1]
            self.left[row] = 0 if stops else self.left[row] - len(tokens)
            self.texts[row] += tokens
            step.tokens.append(tokens)
            step.drafted.append(drafted[row] if open_ else 0)
            step.accepted.append(accepted[row] if open_ else 0)
            step.finished.append(not self.left[row])
        return step

    def _slide(self) -> None:
        """Make room in every row whose cache is full: read the last half of its tokens anew."""
        full = [row for row, held in enumerate(self.cache.lengths) if held >= self.context]
        if not full:
            return
        half = self.context // 2
        # the last token of a text is not in the cache yet
        tokens = torch.tensor([self.texts[row][-half - 1 : -1] for row in full], device=self.device)
        window = self.cache.like(len(full), half)
        self.model(tokens, cache=window)
        self.cache.replace(full, window)

    def _keep(self, lengths: list[int]) -> None:
        """Keep what stands of each row; a finished one is held back, so that it never outgrows the cache."""
        self.cache.truncate([n if left else 1 for n, left in zip(lengths, self.left, strict=True)])


@contextmanager
def _evaluating(model: ElaraLM) -> Iterator[None]:
    """No dropout; the model's mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _cache_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _check(
    model: ElaraLM,
    prompts: list[list[int]],
    mode: str,
    allowed: Tensor | None,
    mask_id: int | None,
    depth: int | None,
) -> None:
    vocab, context = model.config.vocab_size, model.config.model.context_length
    if mode not in MODES:
        raise ElaraError(f"mode={mode} must be one of: {', '.join(MODES)}")
    if not prompts:
        raise ElaraError("there is no prompt: give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ElaraError(f"prompt {row} is empty: give it at least one token, such as the end-of-document id")
        if len(prompt) > context:
            raise ElaraError(f"prompt {row} has {len(prompt)} tokens, the model's context holds {context}: shorten it")
        if bad := [token for token in prompt if not 0 <= token < vocab]:
            raise ElaraError(f"prompt {row} has token id {bad[0]}, outside the model's vocabulary of {vocab}")
    if allowed is not None and (allowed.shape != (vocab,) or not bool(allowed.any())):
        raise ElaraError(f"allowed must mark at least one of {vocab} tokens, got shape {tuple(allowed.shape)}")
    if depth is not None and depth < 1:
        raise ElaraError(f"depth={depth} must be at least 1")
    if mode == "tidar" and not model.config.tidar.block_length:
        raise ElaraError("mode=tidar needs a model with a diffusion head: use mode=ar, or train with tidar=full_mask")
    if mode == "tidar" and (mask_id is None or not 0 <= mask_id < vocab):
        raise ElaraError(f"mode=tidar needs mask_id, the id of [MASK] in the vocabulary of {vocab}; got {mask_id}")
