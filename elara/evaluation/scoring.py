"""Log-probabilities of given tokens: batches sorted by length, one forward for equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elara.errors import NotFinite
from elara.model import ElaraLM

ROWS = 256  # rows of logits alive at once for a large vocabulary: 256 x 50304 floats are 51 MB


@dataclass(frozen=True)
class Request:
    """inputs: token ids that are read, 1 to context_length of them. targets: what must follow the last of them, one
    target for each of the last len(targets) inputs."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class Scored:
    """log_probs: (targets) natural logarithms, float32 or wider. best: (targets) the likeliest ids. On the CPU."""

    log_probs: Tensor
    best: Tensor


def rolling_windows(ids: Sequence[int], prefix: int, context: int, stride: int) -> Iterator[Request]:
    """Cut a text so that every token is a target once, the first one behind `prefix`.

    The first window scores up to `context` tokens, each later one the next `stride` at the end of a full window, as
    lm-eval's rolling windows do. stride: 1 to context.
    """
    done = min(context, len(ids))
    if done:
        yield Request((prefix, *ids[: done - 1]), tuple(ids[:done]))
    while done < len(ids):
        end = min(done + stride, len(ids))
        yield Request(tuple(ids[end - context - 1 : end - 1]), tuple(ids[done:end]))
        done = end


@torch.inference_mode()
def score(
    model: ElaraLM,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 8192,
    depth: int | None = None,
    allowed: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Score every request under the AR head; results in the order of the requests.

    batch_tokens: padded tokens per forward (a longer request is a batch of its own). allowed: boolean (vocab), ids that
    `best` is chosen from; default all. advance: called with the number of requests that are done. Raises NotFinite.
    """
    device = model.embed.weight.device
    places: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        places.setdefault(request.inputs, []).append(i)
    found: list[Scored | None] = [None] * len(requests)
    for batch in _batches(sorted(places, key=len, reverse=True), batch_tokens):
        tokens = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for row, inputs in zip(tokens, batch, strict=True):
            row[: len(inputs)] = torch.tensor(inputs)  # padding stands to the right, where no earlier token looks
        hidden = model(tokens.to(device), depth=depth).hidden
        wanted = [(row, i) for row, inputs in enumerate(batch) for i in places[inputs]]
        parts = [hidden[row, len(batch[row]) - len(requests[i].targets) : len(batch[row])] for row, i in wanted]
        targets = torch.tensor([target for _, i in wanted for target in requests[i].targets], dtype=torch.long)
        log_probs, best = _head(model, torch.cat(parts), targets.to(device), allowed)
        if not log_probs.isfinite().all():
            raise NotFinite
        start = 0
        for _, i in wanted:
            own = slice(start, start + len(requests[i].targets))
            found[i] = Scored(log_probs[own], best[own])
            start = own.stop
        if advance is not None:
            advance(len(wanted))
    return [scored for scored in found if scored is not None]


def _batches(rows: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows, longest first, in batches of at most `batch_tokens` padded tokens."""
    start = 0
    while start < len(rows):
        stop = start + max(1, batch_tokens // len(rows[start]))
        yield rows[start:stop]
        start = stop


def _head(model: ElaraLM, hidden: Tensor, targets: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the likeliest id, both (rows), on the CPU. hidden: (rows, n_embd)."""
    log_probs, best = [], []
    rows = ROWS if model.config.vocab_size > 4096 else 1 << 14
    for some, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.ar_head(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (rows, vocab)
        log_probs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        best.append(logits.argmax(1))
    return torch.cat(log_probs).cpu(), torch.cat(best).cpu()
