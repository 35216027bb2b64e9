"""What the backends behind HTTP share: answers out of streams, many at once, and what a server's refusal means."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from elara.addresses import whole
from elara.backends.base import Answer, BackendError, Capabilities, Messages, Params, TopLogprobs, unsupported
from elara.backends.retry import Attempt, Caller, Failure, Limits, concurrently
from elara.backends.stopping import StopText
from elara.backends.watch import Watch
from elara.backends.writing import Piece, Writing
from elara.errors import ElaraError

EMBEDDED_AT_ONCE = 64  # texts per request
LOGPROBS = (20, 5)  # alternatives to ask for: what OpenAI and Ollama allow, and what older servers do
NEXT_SEED = 7919
SECRET = 4  # characters of the shortest key
QUOTED = 300  # characters of a server's own words in a message
OUT_OF_MEMORY = re.compile(
    r"out of memory|more (system |gpu )?memory|not enough memory|insufficient memory|bad_alloc|"
    r"(failed to|unable to|cannot) allocate|OutOfMemory",
    re.IGNORECASE,
)


class Server(ABC):
    """Another model behind HTTP. A subclass speaks one API through its official client.

    The server applies the chat template itself: whether a special token in a message's words, such as `<|im_end|>`,
    stays plain text or ends a turn is up to it, as these APIs do not take frame and contents apart.
    """

    def __init__(self, limits: Limits, concurrency: int) -> None:
        if concurrency < 1:
            raise BackendError("refused", f"a backend's concurrency is {concurrency}: give 1 or more")
        self.limits, self.concurrency = limits, concurrency
        self._lock = threading.RLock()  # of what is found out once; may be held for long
        self._opening = threading.Lock()  # of the client
        self._client: Any = None
        self._watch = Watch()
        self._call = Caller(self._whom, limits, self._failure)
        self._given_alternatives: int | None = None
        self._secrets: list[str] = []  # cut out of everything that a server says

    @property
    def capabilities(self) -> Capabilities:
        """token_logprobs is found out by asking for one answer; 0 as long as nobody answers."""
        try:
            alternatives = self._alternatives()
        except BackendError:
            alternatives = 0
        return Capabilities(token_logprobs=alternatives, embeddings=True, concurrency=self.concurrency)

    @property
    def fingerprint(self) -> str | None:
        return None

    def tokenizer(self) -> None:
        """A server does not show it."""
        return None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that fix what it answers."""

    def close(self) -> None:
        """Let go of the connections."""
        with self._opening:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _open(self) -> Any:
        """The official client, made when it is first needed."""
        with self._opening:
            if self._client is None:
                try:
                    self._client = self._connect()
                except ImportError as error:
                    what = type(self).__module__.rpartition(".")[2]
                    advice = "pip install 'elara-hivemind[teachers]'"
                    raise ElaraError(f"the backend {what} needs the package {error.name}: {advice}") from error
            return self._client

    @abstractmethod
    def _connect(self) -> Any:
        """A new client, with its own retries off and our bounds in it."""

    @abstractmethod
    def _whom(self) -> str:
        """How messages call the server and the model."""

    @abstractmethod
    def _prepare(self) -> None:
        """What must be known or fetched once before the first request."""

    @abstractmethod
    def _pieces(self, messages: Messages, params: Params) -> Generator[Piece, None, None]:
        """One request for one answer, as it is streamed."""

    @abstractmethod
    def _vectors(self, texts: Sequence[str]) -> list[list[float]]:
        """One request for embeddings, in the order of the texts."""

    @abstractmethod
    def _failure(self, error: Exception, attempt: Attempt) -> Failure:
        """What a client's exception means."""

    def generate(self, messages: Messages, params: Params) -> Iterator[str]:
        """The answer as it is written. Nothing is asked again once a piece is out."""
        self._prepare()
        params = replace(params, logprobs=0)

        def start(attempt: Attempt) -> tuple[str, Generator[str, None, None], Attempt]:
            writing = self._writing(params)
            pieces = self._written(messages, params, writing, attempt)
            begin = ""
            for piece in pieces:
                begin += piece
                if begin.strip():
                    return begin, pieces, attempt
            raise writing.empty()

        begin, rest, attempt = self._call(start)
        try:
            yield begin
            yield from rest
        except Exception as error:
            raise self._call.error(self._call.failure(error, attempt)) from None
        finally:
            rest.close()

    def answers(self, conversations: Sequence[Messages], params: Params) -> Iterator[tuple[int, Answer | BackendError]]:
        """As they are done, `concurrency` at once; see `concurrently`."""
        if not conversations:
            return
        try:
            self._prepare()
            given = replace(params, logprobs=min(params.logprobs, self._alternatives()) if params.logprobs else 0)
        except BackendError as error:
            yield from ((index, error) for index in range(len(conversations)))
            return

        def answer(messages: Messages, cancelled: threading.Event) -> Answer:
            return self._call(lambda attempt: self._answer(messages, given, attempt), cancelled)

        yield from concurrently(answer, conversations, self.concurrency)

    def frame(self, roles: Sequence[str]) -> list[list[int]]:
        raise unsupported(self, "chat template")

    def top_logprobs(self, ids: Tensor, k: int, temperature: float = 1.0) -> TopLogprobs:
        raise unsupported(self, "distribution over the tokens of a given text")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, 0), np.float32)
        self._prepare()
        groups = [texts[start : start + EMBEDDED_AT_ONCE] for start in range(0, len(texts), EMBEDDED_AT_ONCE)]
        parts = [self._embedded(group) for group in groups]
        if len({part.shape[1] for part in parts}) > 1:
            raise self._call.error(_not_vectors())
        return np.concatenate(parts)

    def _writing(self, params: Params) -> Writing:
        return Writing(self.limits.max_characters, StopText(params.stop))

    def _written(
        self, messages: Messages, params: Params, writing: Writing, attempt: Attempt
    ) -> Generator[str, None, None]:
        """The text of one attempt, as `writing` gives it out."""
        self._watch.begin(attempt)
        # Where an answer came back empty, the same seed would give the same nothing again.
        pieces = self._pieces(messages, replace(params, seed=params.seed + NEXT_SEED * attempt.empty))
        try:
            for piece in pieces:
                yield writing.add(piece)
                if writing.finished:
                    break
            yield writing.end()
        finally:
            pieces.close()

    def _answer(self, messages: Messages, params: Params, attempt: Attempt) -> Answer:
        writing = self._writing(params)
        for _ in self._written(messages, params, writing, attempt):
            pass
        answer = writing.answer
        if not answer.text.strip():
            raise writing.empty()
        return answer

    def _alternatives(self) -> int:
        """Alternatives per written token that the server gives; found out once, by asking."""
        with self._lock:
            if self._given_alternatives is None:
                self._prepare()
                self._given_alternatives = self._ask_for_alternatives()
            return self._given_alternatives

    def _ask_for_alternatives(self) -> int:
        messages, params = [{"role": "user", "content": "Hi"}], Params(max_new_tokens=2, temperature=0.0)

        def most(attempt: Attempt, wanted: int) -> int:
            self._watch.begin(attempt)
            pieces = list(self._pieces(messages, replace(params, logprobs=wanted)))
            return max((len(token.top) for piece in pieces for token, _ in piece.tokens), default=0)

        for wanted in LOGPROBS:
            try:
                return min(wanted, self._call(partial(most, wanted=wanted)))
            except BackendError as error:
                if error.kind not in ("refused", "failed", "unfit"):
                    raise
        self._call(partial(most, wanted=0))  # was it that field, or is it the request as a whole?
        return 0

    def _embedded(self, texts: Sequence[str]) -> NDArray[np.float32]:
        def ask(attempt: Attempt) -> NDArray[np.float32]:
            self._watch.begin(attempt)
            vectors = np.asarray(self._vectors(texts), np.float32)  # ValueError where lengths differ
            if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.size or not np.isfinite(vectors).all():
                raise _not_vectors()
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)  # (texts, dimensions)

        return self._call(ask)

    def _refusal(self, status: int, text: str, attempt: Attempt, *, field: str | None = None) -> Failure:
        """What a status code and the server's words mean. field: the part of the request that the server names."""
        said = self._quoted(text)
        why = f"answered {status}" + (f" ({said})" if said else "")
        if OUT_OF_MEMORY.search(text):
            return Failure("out_of_memory", f"ran out of memory ({said})", "take a smaller model or a shorter context")
        if status == 529 or (status == 429 and "insufficient_quota" not in text):
            return Failure("rate_limited", why, "ask for less at once, or set `requests_per_minute`", again=True,
                           wait=attempt.wait)  # fmt: skip
        if status in (401, 402, 403, 407, 429):
            return Failure("refused", why, self._about_keys())
        if status in (404, 405):
            return Failure("refused", why, self._about_models())
        if status == 501:
            return Failure("refused", why, "take another server or model for that")
        if status in (502, 503):
            return Failure("unreachable", why, "wait until it is up", again=True, wait=attempt.wait)
        if status in (408, 504):
            return Failure("timeout", why, "ask for less at once", again=True, wait=attempt.wait)
        if status in (409, 425) or status >= 500:
            return Failure("failed", why, "look at the server's log", again=True, wait=attempt.wait)
        if field is not None:
            return Failure("refused", why, f"it does not take `{field}` as it was given")
        return Failure("unfit", why, "see whether the conversation fits the model and its context")

    def _keep_secret(self, *secrets: str | None) -> None:
        # What is shorter is a placeholder, and part of many words.
        self._secrets = [secret for secret in secrets if secret is not None and len(secret) >= SECRET]

    def _quoted(self, text: str) -> str:
        """A server's words for a message: one line, not long, without what is secret."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        line = " ".join(text.split())
        return line if len(line) <= QUOTED else line[: QUOTED - 3] + "..."

    @abstractmethod
    def _about_keys(self) -> str: ...

    @abstractmethod
    def _about_models(self) -> str: ...


def broken_off() -> Failure:
    return Failure("failed", "broke the connection off", "look at the server's log", again=True)


def not_understood(what: str) -> Failure:
    """An answer that is not of the API."""
    advice = "see whether the address is that of this API"
    return Failure("failed", f"sent what is not an answer of {what}", advice, again=True)


def _not_vectors() -> Failure:
    return Failure("failed", "gave no vectors of one length for the texts", "take a model that embeds")


def parsed(url: str, key: str, example: str) -> SplitResult:
    """The parts of an http(s) address; BackendError that names the configuration's key when it is none."""
    try:
        parts = urlsplit(whole(url))
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise BackendError("refused", f"{key} is no http(s) address: write it as {example}")
    if parts.query or parts.fragment:  # where a key would be seen in logs
        raise BackendError("refused", f"{key} has a query: keys go into the environment, options into their own keys")
    return parts


def shown(parts: SplitResult) -> str:
    """An address without credentials."""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def credentials(parts: SplitResult) -> tuple[str, str] | None:
    """User and password of an address, which must not be in what clients log."""
    return (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
