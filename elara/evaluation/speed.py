"""Generation speed of every decoding mode, in turn, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from elara.calibration import controller_for
from elara.checkpoint import Loaded
from elara.config import MODES
from elara.decoding import Controller, SamplingConfig, generate, writable
from elara.errors import naming


@dataclass
class Speed:
    """One decoding mode in one precision. tokens_per_second: the median over the rounds, prompt included; low, high:
    its quartiles. against_ar: median of the ratios to float32 `ar` in the same round. tokens_per_forward: over all."""

    mode: str
    precision: str
    tokens_per_second: float
    low: float
    high: float
    against_ar: float
    tokens_per_forward: float
    rounds: int
    batch: int


@dataclass
class _Timed:
    tokens: int
    forwards: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def modes_of(loaded: Loaded) -> list[str]:
    """The decoding modes that a model can serve, `ar` first: all others need a diffusion head."""
    drafts = loaded.config.tidar.block_length > 1
    return ["ar", *(mode for mode in MODES if mode != "ar" and drafts)]


def measure_speed(
    models: Sequence[Mapping[str, Loaded]],
    prompts: Sequence[list[list[int]]],
    new_tokens: int,
    *,
    rounds: int = 5,
    batch: int = 1,
    depth: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[list[Speed]]:
    """Greedy generation of `new_tokens` behind held-out prompts; one list of modes per model.

    models: each by precision, `float32` among them. prompts: of each model, at least one. A round takes the next
    `batch` prompts through all models, precisions and modes; one round runs first and does not count. The controller of
    `auto` is calibrated before, if it never was on this machine. advance: called with 1 behind each round.
    """
    controllers = {
        (i, precision): controller_for(loaded, precision=precision, batch=batch, depth=depth)
        for i, model in enumerate(models)
        for precision, loaded in model.items()
        if "auto" in modes_of(loaded)
    }
    timed: dict[tuple[int, str, str], list[_Timed]] = {
        (i, precision, mode): []
        for i, model in enumerate(models)
        for precision, loaded in model.items()
        for mode in modes_of(loaded)
    }
    for number in range(rounds + 1):
        for (i, precision, mode), taken in timed.items():
            rows = [prompts[i][(number * batch + row) % len(prompts[i])] for row in range(batch)]
            controller = controllers[i, precision] if mode == "auto" else None
            loaded = models[i][precision]
            with naming(f"{loaded.path or 'a model'} in {precision}"):
                taken.append(_timed(loaded, rows, mode, new_tokens, depth, controller))
        if advance is not None:
            advance(1)
    found: list[list[Speed]] = [[] for _ in models]
    for (i, precision, mode), every in timed.items():
        counted = every[1:]
        rates = sorted(one.rate for one in counted)
        quartiles = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
        ratios = [one.rate / ar.rate for one, ar in zip(counted, timed[i, "float32", "ar"][1:], strict=True)]
        per_forward = sum(one.tokens for one in counted) / sum(one.forwards for one in counted) / batch
        middle, ratio = statistics.median(rates), statistics.median(ratios)
        figures = Speed(mode, precision, middle, quartiles[0], quartiles[2], ratio, per_forward, rounds, batch)
        found[i].append(figures)
    return found


def _timed(
    loaded: Loaded,
    prompts: list[list[int]],
    mode: str,
    new_tokens: int,
    depth: int | None,
    controller: Controller | None,
) -> _Timed:
    model, tokenizer = loaded.model, loaded.tokenizer
    sampling = SamplingConfig(mode=mode, max_new_tokens=new_tokens, temperature=0.0)
    allowed = writable(tokenizer, model.config.vocab_size)
    device = model.embed.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    tokens = forwards = 0
    steps = generate(
        model, prompts, sampling, allowed=allowed, mask_id=tokenizer.mask_id, depth=depth, controller=controller
    )
    for step in steps:
        tokens += sum(map(len, step.tokens))
        forwards += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _Timed(tokens, forwards, time.perf_counter() - begin)
