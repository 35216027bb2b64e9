"""What every other model offers, whether it teaches, answers for the hive or embeds texts.

A teacher is a backend with a weight, a queen a backend with prompts, an embedder a backend's `embed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from elara.errors import ElaraError

if TYPE_CHECKING:  # the configuration imports this package, and composing it should not wait for torch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from elara.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]  # each with `role` (system, user, assistant, tool) and `content`


class BackendError(ElaraError):
    """A backend could not do what was asked, its own retries included.

    kind: unreachable | timeout | rate_limited | refused | out_of_memory | unfit | empty | endless | not_text | failed.
    `refused` is the server's word on the request itself (no such model, bad key): asking again would not help. `unfit`
    is about this conversation alone: too long for the context, or a role that the model's chat template lacks. `failed`
    is the server's own trouble: an error in it, a connection that broke, an answer that is none.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def lasting(self) -> bool:
        """Whether the next prompt would meet the same."""
        return self.kind in ("unreachable", "refused", "out_of_memory")


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do. concurrency: answers that it works on at once."""

    chat: bool = True  # generate and answers
    logits: bool = False  # top_logprobs
    token_logprobs: int = 0  # alternatives per written token that `answers` can return; 0 = none
    embeddings: bool = False  # embed
    concurrency: int = 1


@dataclass(frozen=True)
class Params:
    """How an answer is written. temperature 0 = greedy; top_k 0 and top_p 1 = all tokens."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0  # of the sampling; equal seeds give equal answers, as far as the source allows
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    logprobs: int = 0  # alternatives per written token to return, at most Capabilities.token_logprobs


@dataclass(frozen=True)
class TokenChoice:
    """A written token: its text, its log-probability in nats and the likeliest alternatives, best first."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer. finish: `stop` (the model ended it) or `length` (max_new_tokens did)."""

    text: str
    finish: str
    tokens: tuple[TokenChoice, ...] = ()  # where Params.logprobs asked for them


@dataclass(frozen=True)
class TopLogprobs:
    """The k likeliest next tokens behind every position, in nats, of the whole distribution at a temperature.

    ids: int64 (batch, seq, k); logprobs: float32 (batch, seq, k), best first; rest: float32 (batch, seq), of all other
    tokens together. following: float32 (batch, seq - 1), of the token that does follow, at temperature 1.
    """

    ids: Tensor
    logprobs: Tensor
    rest: Tensor
    following: Tensor


class Backend(Protocol):
    """Another model. Everything slow happens in the methods, not when it is built.

    Methods that `capabilities` excludes raise BackendError of kind `refused`.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def fingerprint(self) -> str | None:
        """Of its tokenizer, as `Tokenizer.fingerprint`; None when the source does not show one."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer as Elara's students have it; None when the source does not show one."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON values that fix what it answers: kind, model, revision (hash, digest or commit where there is one)."""
        ...

    def generate(self, messages: Messages, params: Params) -> Iterator[str]:
        """The assistant's next message in pieces; never splits a character."""
        ...

    def answers(self, conversations: Sequence[Messages], params: Params) -> Iterator[tuple[int, Answer | BackendError]]:
        """(index, answer) of every conversation, in the order in which they are done; an error ends its own only.

        Raises NotFinite, as `generate` does, for a model in this process whose numbers are nan or infinite.
        """
        ...

    def frame(self, roles: Sequence[str]) -> list[list[int]]:
        """Ids of its own around the messages of a conversation with these roles: before each, and behind the last.

        Raises BackendError: `unfit` for an order of roles that its chat template refuses, `refused` without a template.
        """
        ...

    def top_logprobs(self, ids: Tensor, k: int, temperature: float = 1.0) -> TopLogprobs:
        """ids: int64 (batch, seq) of its own tokenizer, full rows without padding."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (texts, dimensions)."""
        ...

    def close(self) -> None:
        """Let go of memory, connections and processes."""
        ...


def unsupported(backend: object, what: str) -> BackendError:
    """The error of a method that a backend does not have."""
    return BackendError("refused", f"{type(backend).__name__} gives no {what}: take another teacher for that")
