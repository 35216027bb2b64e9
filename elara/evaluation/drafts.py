"""TiDAR on held-out text: diffusion loss by position in the block, how far drafts reach, tokens per forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from elara.decoding import SamplingConfig, measure_acceptance, writable
from elara.errors import NotFinite
from elara.evaluation.loss import Windows
from elara.evaluation.scoring import ROWS, Request
from elara.evaluation.text import HeldOutText
from elara.model import ElaraLM, draw_section
from elara.tokenizer import Tokenizer

TOKENS = 16384  # of held-out text that the diffusion loss is measured on: each is read with its block's masks


@dataclass
class Acceptance:
    """Drafts at one temperature. reach[i]: share of the drafts whose first i + 2 tokens all stood (the first always
    does). tokens, forwards: written tokens and the forwards that wrote them, summed over the prompts."""

    temperature: float
    tokens_per_forward: float
    reach: list[float]
    tokens: int
    forwards: int


@dataclass
class Drafts:
    """diffusion_loss[i]: nats per token at place i of a block whose tokens are all masked. prompts: continued texts."""

    diffusion_loss: list[float]
    prompts: int
    acceptance: list[Acceptance]


def held_out_prompts(text: HeldOutText, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Up to `count` prompts of at most `length` tokens, from places spread evenly over the passages."""
    prompts = []
    for i in range(count):
        passage, share = divmod(i * len(text.passages), count)
        whole = text.passages[passage]
        start = len(whole) * share // count
        ids = text.encode(passage, tokenizer, start, start + 16 * length)[:length]
        prompts.append(ids or [tokenizer.end_id])
    return prompts


def measure_drafts(
    model: ElaraLM,
    tokenizer: Tokenizer,
    windows: Windows,
    prompts: list[list[int]],
    temperatures: Sequence[float],
    new_tokens: int,
    *,
    seed: int = 0,
    depth: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Drafts:
    """Diffusion loss on some of the windows and acceptance behind the prompts, all of them in one batch.

    advance: called with 1 behind each of the 1 + len(temperatures) parts.
    """
    report = advance or (lambda _: None)
    loss = diffusion_loss(model, windows.requests, tokenizer.mask_id, depth=depth)
    report(1)
    found = []
    for temperature in temperatures:
        sampling = SamplingConfig(
            mode="tidar", max_new_tokens=new_tokens, temperature=temperature, seed=seed, stop=[tokenizer.end_id]
        )
        allowed = writable(tokenizer, model.config.vocab_size)
        counts = measure_acceptance(model, prompts, sampling, tokenizer.mask_id, allowed=allowed, depth=depth)
        per_forward, reach = counts.tokens_per_forward, counts.reach
        found.append(Acceptance(temperature, per_forward, reach, counts.tokens, counts.forwards))
        report(1)
    return Drafts(loss, len(prompts), found)


@torch.inference_mode()
def diffusion_loss(
    model: ElaraLM, requests: Sequence[Request], mask_id: int, *, depth: int | None = None
) -> list[float]:
    """Cross entropy of the diffusion head by place in the block, nats per token; every token of a block is masked.

    Windows are taken evenly from `requests`, up to `TOKENS` tokens; those too short for a block are passed over. [] if
    all are. The blocks stand on a grid whose offset is drawn per window, with a fixed seed. Raises NotFinite.
    """
    length = model.config.tidar.block_length
    config = replace(model.config.tidar, block_fraction=1.0, schedule="full")
    usable = [request.inputs for request in requests if len(request.inputs) > length + 1]
    count = min(len(usable), max(1, TOKENS // model.config.model.context_length))
    generator = torch.Generator().manual_seed(0)
    total, blocks = torch.zeros(length, dtype=torch.float64), 0
    for i in range(count):
        tokens = torch.tensor([usable[i * len(usable) // count]], device=model.embed.weight.device)
        section, supervision = draw_section(tokens, config, mask_id, generator)
        hidden = model(tokens, section=section, depth=depth).mask_hidden
        assert hidden is not None
        previous = tokens[0, section.positions()[0].to(tokens.device) - 1]  # the right ones, as in training
        parts = zip(hidden[0].split(ROWS), supervision.targets[0].split(ROWS), previous.split(ROWS), strict=True)
        losses = []
        for rows, targets, before in parts:
            logits = model.diffusion_head(rows, before)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
        total += torch.cat(losses).double().view(-1, length).sum(0).cpu()
        blocks += section.starts.shape[-1]
    if not total.isfinite().all():
        raise NotFinite
    return [float(value) for value in total / blocks] if blocks else []
