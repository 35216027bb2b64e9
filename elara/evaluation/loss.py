"""Loss on held-out text: per token, per byte, per character, with standard errors over passages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from elara.errors import ElaraError
from elara.evaluation.scoring import Request, Scored, rolling_windows, score
from elara.evaluation.text import HeldOutText
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer
from elara.tokenizer.char import CharTokenizer


@dataclass
class Windows:
    """A tokenized text, ready to be scored. passages[i]: the passage that requests[i] is from. sizes: UTF-8 bytes of
    each passage; characters: of all."""

    requests: list[Request]
    passages: list[int]
    sizes: list[int]
    characters: int


@dataclass
class Loss:
    """Held-out loss. loss: nats per token, perplexity: its exponential. Errors are standard errors with passages as
    units, since the tokens of a passage are not independent. nats, sizes: of each passage, for paired differences."""

    tokens: int
    bytes: int
    characters: int
    loss: float
    loss_error: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float
    bits_per_char: float
    nats: list[float] = field(repr=False)
    sizes: list[int] = field(repr=False)


def cut_windows(text: HeldOutText, tokenizer: Tokenizer, context: int, stride: int | None, name: str) -> Windows:
    """Tokenize every passage by itself and cut it into windows of `context` tokens.

    stride: tokens that each window behind the first scores; None = context. name: of the model, for messages. Raises
    ElaraError when the tokenizer loses a character or the stride is longer than the context.
    """
    if stride is not None and stride > context:
        raise ElaraError(f"eval.stride={stride} must be at most the context of {name}, {context} tokens")
    known = set(tokenizer.characters) if isinstance(tokenizer, CharTokenizer) else None
    if known is not None and (unknown := sorted(set("".join(text.passages)) - known)):
        listed = " ".join(map(repr, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
        raise ElaraError(
            f"{name} knows {len(known)} characters, and the {text.title} has {len(unknown)} others ({listed}): "
            "choose other data for it"
        )
    windows = Windows([], [], [], 0)
    for i, passage in enumerate(text.passages):
        ids = text.encode(i, tokenizer)
        cut = list(rolling_windows(ids, tokenizer.end_id, context, stride or context))
        windows.requests += cut
        windows.passages += [i] * len(cut)
        windows.sizes.append(len(passage.encode("utf-8")))
        windows.characters += len(passage)
    return windows


def measure_loss(
    model: ElaraLM,
    windows: Windows,
    *,
    batch_tokens: int = 8192,
    depth: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Loss, list[Scored]]:
    """Score all windows; returns the figures and each window's scores."""
    scored = score(model, windows.requests, batch_tokens=batch_tokens, depth=depth, advance=advance)
    return summarize(windows, scored), scored


def summarize(windows: Windows, scored: Sequence[Scored]) -> Loss:
    """The figures of scored windows."""
    nats, tokens = [0.0] * len(windows.sizes), [0] * len(windows.sizes)
    for passage, one in zip(windows.passages, scored, strict=True):
        nats[passage] -= float(one.log_probs.double().sum())
        tokens[passage] += len(one.log_probs)
    loss, loss_error = ratio(nats, tokens)
    per_byte, per_byte_error = ratio(nats, windows.sizes)
    return Loss(
        tokens=sum(tokens),
        bytes=sum(windows.sizes),
        characters=windows.characters,
        loss=loss,
        loss_error=loss_error,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=per_byte / math.log(2),
        bits_per_byte_error=per_byte_error / math.log(2),
        bits_per_char=sum(nats) / math.log(2) / windows.characters,
        nats=nats,
        sizes=windows.sizes,
    )


def difference(one: Loss, other: Loss) -> tuple[float, float]:
    """Bits per byte of `one` less those of `other` on the same passages, and the standard error of this difference.

    Paired by passage, so it is far smaller than the errors of both: hard passages are hard for every model. Raises
    ElaraError when the two were measured on different text.
    """
    if one.sizes != other.sizes:
        raise ElaraError("the two losses are of different text: measure both with the same data and eval.passage")
    mean, error = ratio([a - b for a, b in zip(one.nats, other.nats, strict=True)], one.sizes)
    return mean / math.log(2), error / math.log(2)


def ratio(totals: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """sum(totals) / sum(counts) and its standard error, the pairs being a sample (Cochran, Sampling Techniques, 2.11).

    The error is nan for a single pair.
    """
    total, count = torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    mean = float(total.sum() / count.sum())
    n = len(total)
    if n < 2:
        return mean, math.nan
    residuals = total - mean * count
    return mean, float((residuals.square().sum() * n / (n - 1)).sqrt() / count.sum())
