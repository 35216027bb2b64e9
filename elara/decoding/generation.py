"""Rows of tokens in, steps of new tokens out, by any mode.

A text longer than the context goes on in a sliding window: when the cache holds `context_length` tokens, the last half
of them is read anew. When that happens depends on the length of the text alone, so every exact mode writes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elara.config import MODES, SamplingConfig
from elara.decoding.controller import Controller
from elara.decoding.diffusion import denoise_step
from elara.decoding.engine import Engine, Row
from elara.decoding.inference import inference
from elara.decoding.prefix import Prefixes
from elara.decoding.tidar import AR, Plan
from elara.errors import ElaraError, NotFinite
from elara.model import ElaraLM

LONGEST_DRAFT = 64  # tokens per step, where the model was not trained for more


@dataclass
class Step:
    """What one forward gave. tokens: new tokens of each row; drafted, accepted: how many drafted tokens were put to the
    test and how many of these stood; finished: rows that are at their end."""

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
    controller: Controller | None = None,
    prefixes: Prefixes | None = None,
) -> Iterator[Step]:
    """Continue every prompt until a stop token (which is emitted) or `max_new_tokens`; one Step per forward.

    prompts: token ids, 1 to context_length of each, of any lengths. mode: default `sampling.mode`. allowed: boolean
    (vocab), the tokens that may be written; default all. mask_id: the [MASK] token, needed by tidar and diffusion.
    depth: recursion depth, default the trained one. controller: chooses what each TiDAR step does, unless
    `sampling.draft_length` fixes it; without either, a step has the trained length and a group behind every token.
    prefixes: beginnings that are read already. Row r draws from seed + r. `ar` and `tidar` draw from the same
    distribution (trust aside); at temperature 0 they write the same. Raises ElaraError, before the first step, for
    prompts, ids or a mode that this model cannot serve; NotFinite at the step whose logits are nan or infinite.
    """
    mode = resolve_mode(model, mode or sampling.mode, mask_id, None if sampling.exit_threshold else controller)
    check_request(model, prompts, sampling, mode, allowed, mask_id, depth)
    length = sampling.draft_length or model.config.tidar.block_length
    controller = None if sampling.draft_length or mode != "tidar" else controller
    longest = length if controller is None else max(length, controller.longest)
    engine = Engine(
        model,
        slots=len(prompts),
        capacity=max(map(len, prompts)) + sampling.max_new_tokens,
        room={"ar": 1, "diffusion": 2 * model.config.tidar.block_length}.get(mode, longest * (longest + 1) + 1),
        mask_id=mask_id,
        allowed=allowed,
        depth=depth,
        prefixes=prefixes,
    )
    drafts = mode == "tidar"
    rows = [new_row(i, prompt, sampling, sampling.seed + i, drafts=drafts) for i, prompt in enumerate(prompts)]
    return _run(engine, rows, mode, fixed_plan(sampling, length), controller)


def new_row(key: int, prompt: Sequence[int], sampling: SamplingConfig, seed: int, *, drafts: bool) -> Row:
    """A row at its beginning; its random numbers depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return Row(key, list(prompt), sampling, sampling.max_new_tokens, generator, drafts)


def fixed_plan(sampling: SamplingConfig, length: int) -> Plan:
    """The step without a controller: groups behind every number of tokens, or behind the fewest and the most."""
    if length == 1:
        return AR
    count = length if sampling.groups is None else min(sampling.groups, length)
    longest = range(length, length - count + 1, -1)  # a whole draft or nothing are the likeliest outcomes
    return Plan(length, tuple(sorted({1, *longest} if count > 1 else {length})), length)


def _run(engine: Engine, rows: list[Row], mode: str, fixed: Plan, controller: Controller | None) -> Iterator[Step]:
    if controller is not None:
        controller.begin()
    with inference(engine.model):
        engine.admit(rows)
    while engine.rows:
        moved = list(engine.rows)
        with inference(engine.model):  # not around `yield`: the caller's own work in between may need gradients
            if mode == "diffusion":
                denoise_step(engine)
            else:
                move(engine, fixed, controller)
            engine.retire()
        if any(row.broken for row in moved):
            raise NotFinite
        step = Step([[] for _ in rows], [0] * len(rows), [0] * len(rows), [row.finished for row in rows])
        for row in moved:
            step.tokens[row.key], step.drafted[row.key], step.accepted[row.key] = row.new, row.drafted, row.accepted
        yield step


def move(engine: Engine, fixed: Plan, controller: Controller | None) -> None:
    """One step of all rows: autoregression if none of them drafts, else what the controller says, or the fixed plan."""
    if not any(row.drafts for row in engine.rows):
        engine.step(AR)
    elif controller is not None:
        controller.step(engine)
    elif fixed == AR:
        engine.step(AR)
    else:
        engine.step(fixed if any(row.draft.tokens for row in engine.rows) else Plan(1, (1,), fixed.masks))


def resolve_mode(model: ElaraLM, mode: str, mask_id: int | None, controller: Controller | None) -> str:
    """What `auto` means here: tidar when the model can draft and a controller sets the pace, else ar."""
    if mode != "auto":
        return mode
    drafts = model.config.tidar.block_length and mask_id is not None and controller is not None
    return "tidar" if drafts else "ar"


def check_request(
    model: ElaraLM,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    mode: str,
    allowed: Tensor | None,
    mask_id: int | None,
    depth: int | None,
) -> None:
    """Raise ElaraError for what this model cannot serve."""
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
        if sampling.overflow == "error" and len(prompt) + sampling.max_new_tokens > context:
            raise ElaraError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens={sampling.max_new_tokens}, the model's "
                f"context holds {context}: ask for less, or set overflow=slide"
            )
        if bad := [token for token in prompt if not 0 <= token < vocab]:
            raise ElaraError(f"prompt {row} has token id {bad[0]}, outside the model's vocabulary of {vocab}")
    if allowed is not None and (allowed.shape != (vocab,) or not bool(allowed.any())):
        raise ElaraError(f"allowed must mark at least one of {vocab} tokens, got shape {tuple(allowed.shape)}")
    if mode == "diffusion" and allowed is not None and allowed.nonzero().tolist() == [[mask_id]]:
        raise ElaraError("mode=diffusion needs a token other than [MASK] that may be written: allow one")
    longest = max(LONGEST_DRAFT, model.config.tidar.block_length)
    if mode == "tidar" and (sampling.draft_length or 0) > longest:
        raise ElaraError(
            f"draft_length={sampling.draft_length} must be at most {longest}: a step has its square in masks"
        )
    if mode == "tidar" and sampling.exit_threshold:
        raise ElaraError(
            f"exit_threshold={sampling.exit_threshold} needs mode=ar or diffusion: where recursion ends depends on the "
            "tokens of a forward, so drafts verified together would not be held to what mode=ar writes"
        )
    if depth is not None and depth < 1:
        raise ElaraError(f"depth={depth} must be at least 1")
    if mode != "ar" and not model.config.tidar.block_length:
        raise ElaraError(f"mode={mode} needs a model with a diffusion head: use mode=ar, or train with tidar=full_mask")
    if mode != "ar" and (mask_id is None or not 0 <= mask_id < vocab):
        raise ElaraError(f"mode={mode} needs mask_id, the id of [MASK] in the vocabulary of {vocab}; got {mask_id}")
