"""What an exported file is compared with: the torch model in float32, on text that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elara.data.preparation import open_prepared
from elara.decoding import SamplingConfig, generate
from elara.decoding.completion import writable
from elara.errors import ElaraError
from elara.evaluation.models import data_of
from elara.export.source import Source
from elara.model import ElaraLM

WINDOW = 128  # tokens read at once; short, so that they come from several places
GREEDY = 32  # tokens that are written greedily
PROMPT = 16  # behind so many


@dataclass(frozen=True)
class Reference:
    """text: where the windows are from, in words. windows: token ids; logits: (tokens, vocab) float32 of each.
    prompt, greedy: the beginning of the first window, and the likeliest tokens behind it."""

    text: str
    windows: list[list[int]]
    logits: list[NDArray[np.float32]]
    prompt: list[int]
    greedy: list[int]


@torch.inference_mode()
def make_reference(source: Source, data_root: Path, tokens: int) -> Reference:
    """Run the checkpoint in float32. data_root: folder of prepared data. tokens: to compare, about.

    Raises ElaraError when `tokens` is too few.
    """
    if tokens < 2:
        raise ElaraError(f"verify_tokens={tokens} must be at least 2")
    model, context = source.weights.model(), source.config.model.context_length
    window = min(WINDOW, context, tokens)
    count = max(1, tokens // window)
    text, windows = _held_out(source, data_root, window, count) or _own_text(model, source, window, count)
    logits = [model.ar_head(model(torch.tensor([ids]), depth=source.depth).hidden)[0].numpy() for ids in windows]
    prompt = windows[0][: max(1, min(PROMPT, window // 2, context - 1))]
    written = _write(model, source, [prompt], min(GREEDY, context - len(prompt)), temperature=0.0)[0]
    return Reference(text, windows, logits, prompt, written)


def loss(logits: Sequence[NDArray[np.float32]], windows: Sequence[Sequence[int]]) -> float:
    """Nats per token of windows, each predicted from its second token on."""
    nats = 0.0
    for rows, ids in zip(logits, windows, strict=True):
        ahead = torch.from_numpy(rows[:-1]).double().log_softmax(-1)
        nats -= float(ahead.gather(1, torch.tensor(list(ids[1:]))[:, None]).sum())
    return nats / max(1, sum(len(ids) - 1 for ids in windows))


def divergence(theirs: Sequence[NDArray[np.float32]], ours: Sequence[NDArray[np.float32]]) -> float:
    """Mean Kullback-Leibler divergence of a reader's distributions from the checkpoint's, nats per token."""
    total = 0.0
    for other, own in zip(theirs, ours, strict=True):
        log_q, log_p = (torch.from_numpy(rows).double().log_softmax(-1) for rows in (other, own))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / sum(map(len, ours))


def _held_out(source: Source, root: Path, window: int, count: int) -> tuple[str, list[list[int]]] | None:
    """Windows at even distances in the held-out part of the run's data, where that is prepared already."""
    data = data_of(source.folder)
    if data is None:
        return None
    for manifest in sorted((root / "prepared").glob(f"{data.name}-*/manifest.json")):
        try:
            prepared = open_prepared(manifest.parent)
        except (ElaraError, OSError, ValueError, KeyError):
            continue  # being built, or damaged: the export does not need it
        ids = prepared.val.tokens
        if prepared.tokenizer.fingerprint == source.tokenizer.fingerprint and len(ids) >= window:
            count = min(count, len(ids) // window)
            starts = [i * (len(ids) - window) // max(1, count - 1) for i in range(count)]
            return f"held-out part of {data.name}", [ids[start : start + window].tolist() for start in starts]
    return None


def _own_text(model: ElaraLM, source: Source, window: int, count: int) -> tuple[str, list[list[int]]]:
    """Text that the model writes itself; drawn, since greedy text soon repeats itself."""
    starts = [[source.tokenizer.end_id]] * count
    written = _write(model, source, starts, window - 1, temperature=1.0)
    return "the model's own text", [start + rest for start, rest in zip(starts, written, strict=True)]


def _write(
    model: ElaraLM, source: Source, prompts: list[list[int]], count: int, *, temperature: float
) -> list[list[int]]:
    sampling = SamplingConfig(mode="ar", max_new_tokens=count, temperature=temperature)
    allowed = writable(source.tokenizer, source.config.vocab_size) if temperature else None
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, sampling, allowed=allowed, depth=source.depth):
        for row, new in zip(rows, step.tokens, strict=True):
            row += new
    return rows
