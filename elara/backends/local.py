"""What the backends that run inside this process share: sampling, memory, log-probabilities in chunks."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from elara.backends.base import BackendError, Messages, Params, TokenChoice, TopLogprobs
from elara.decoding import SamplingConfig

READ_AT_ONCE = 4096  # tokens per forward that no answer is drawn from: bounds the hidden states in memory
HEAD_AT_ONCE = 256  # positions whose logits are in memory at the same time
TOKEN_LOGPROBS = 64  # alternatives per written token, at most


def sampling_of(params: Params) -> SamplingConfig:
    """The same wishes for our own sampler; raises ElaraError for values that make no sense."""
    if not 0 <= params.logprobs <= TOKEN_LOGPROBS:
        raise BackendError("refused", f"logprobs={params.logprobs} must be between 0 and {TOKEN_LOGPROBS}")
    return SamplingConfig(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_k=params.top_k or None,
        top_p=params.top_p,
        seed=params.seed,
    )


def seed_of(params: Params, prompt: Sequence[int]) -> int:
    """The seed of one answer: of the wish and the prompt, so that answers to many prompts are drawn independently."""
    digest = hashlib.blake2b(repr((params.seed, list(prompt))).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def last_text(messages: Messages) -> str:
    """What a model without chat template continues; BackendError `unfit` when there is no such text."""
    text = messages[-1].get("content") if messages else None
    if not isinstance(text, str):
        raise BackendError("unfit", "the conversation has no last message with a text under 'content'")
    return text


def check_ids(ids: Tensor, vocab_size: int, context: int | None) -> None:
    """Raise BackendError unless a model can read these rows."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise BackendError("refused", f"token id {bad} is outside the teacher's vocabulary of {vocab_size}")
    if context is not None and ids.shape[1] > context:
        raise BackendError("refused", f"rows of {ids.shape[1]} tokens, the teacher's context holds {context}")


def top_of(
    hidden: Iterable[Tensor], head: Callable[[Tensor], Tensor], k: int, ids: Tensor, temperature: float
) -> TopLogprobs:
    """What a model says behind each of `ids` (batch, seq).

    hidden: (positions, n_embd) of all of them in order, in parts of any size. head: makes logits of some.
    """
    following = ids.roll(-1, 1).flatten()  # behind a row's end stands nothing, whose value is left out below
    found, start = list[tuple[Tensor, ...]](), 0
    for some in (some for part in hidden for some in part.split(HEAD_AT_ONCE)):
        logits = head(some).float()  # (positions, vocab)
        target = following[start : start + len(some)].to(logits.device)
        start += len(some)
        then = logits.gather(1, target[:, None])[:, 0]
        if temperature != 1:  # the token that follows is judged without it
            then -= logits.logsumexp(1)
            logits = logits.div_(temperature)
        top, logprobs, rest, norm = top_k(logits, k)
        found.append((top, logprobs, rest, then - norm if temperature == 1 else then))
    columns = [torch.cat(column).to(ids.device) for column in zip(*found, strict=True)]
    top, logprobs, rest, then = (column.unflatten(0, ids.shape) for column in columns)
    return TopLogprobs(top, logprobs, rest, then[:, :-1])


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest tokens, best first, their log-probabilities, the one of all others together, and the normaliser.

    logits: (positions, vocab) float32, lost in this: the vocabulary is large, and every copy costs as much as the sums.
    The mass of the others is summed, not what is left of 1: it may be tiny.
    """
    values, ids = logits.topk(min(k, logits.shape[1]), dim=1)
    others = logits.scatter_(1, ids, -torch.inf)
    largest = others.amax(1, keepdim=True).clamp(min=torch.finfo(others.dtype).min)  # -inf where there are no others
    rest = others.sub_(largest).exp_().sum(1).log_() + largest[:, 0]
    norm = torch.logaddexp(values.logsumexp(1), rest)
    return ids, values - norm[:, None], rest - norm, norm


def choices(logits: Tensor, written: Sequence[int], k: int, text_of: Callable[[int], str]) -> list[TokenChoice]:
    """What was drawn from logits (tokens, vocab), and the k likeliest beside it. text_of: the text of a token."""
    drawn = torch.tensor(written, device=logits.device)[:, None]
    chosen = logits.float().gather(1, drawn)[:, 0]
    ids, logprobs, _, norm = top_k(logits.float().clone(), k)
    chosen -= norm
    found = zip(written, chosen.tolist(), ids.tolist(), logprobs.tolist(), strict=True)
    return [
        TokenChoice(text_of(token), value, tuple((text_of(i), v) for i, v in zip(others, values, strict=True)))
        for token, value, others, values in found
    ]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether it was memory that an error, or what caused it, was about."""
    if error is None:
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return True
    return out_of_memory(error.__cause__)


def no_memory() -> BackendError:
    return BackendError("out_of_memory", "the model or its batch does not fit into memory: lower backend.batch_size")


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn torch's errors about memory into ours."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) and not isinstance(error, BackendError):
            free()
            raise no_memory() from error
        raise


def free() -> None:
    """Give what nobody holds any more back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
