"""Models that Ollama serves, through its official client."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult

from elara.addresses import whole
from elara.backends.base import BackendError, Messages, Params, TokenChoice
from elara.backends.retry import Attempt, Failure, Limits
from elara.backends.server import Server, broken_off, credentials, not_understood, parsed, shown
from elara.backends.writing import Piece, called, finish_of

if TYPE_CHECKING:
    import ollama

PORT = 11434
EXAMPLE = "host:port"
SILENT_PULL = 600.0  # seconds that a server may say nothing while it checks what it fetched
DESCRIBED = ("family", "parameter_size", "quantization_level")


class Ollama(Server):
    """A model that Ollama serves.

    Args:
        model: as `ollama list` names it.
        host: None = the environment variable OLLAMA_HOST, or this machine.
        pull: fetch the model when the server does not have it.
        keep_alive: how long it stays in memory behind an answer, as in "10m"; None = the server's choice.
        num_ctx: tokens of its context; None = the server's choice. Ollama cuts longer conversations without a word.
        think: whether a model that can think does; None = the model's choice. Thoughts never are part of an answer.
        concurrency, timeout, deadline, retries, retry_delay, max_characters, requests_per_minute: see `Limits`.
    """

    def __init__(
        self, model: str = "smollm2:135m", host: str | None = None, *, pull: bool = True,
        keep_alive: float | str | None = None, num_ctx: int | None = None, think: bool | None = None,
        concurrency: int = 1, timeout: float = 120.0, deadline: float = 600.0, retries: int = 4,
        retry_delay: float = 0.5, max_characters: int = 100_000, requests_per_minute: float | None = None,
    ) -> None:  # fmt: skip
        self._parts = _address(host)
        limits = Limits(timeout, deadline, retries, retry_delay, max_characters, requests_per_minute)
        super().__init__(limits, concurrency)
        self.model, self.pull = model, pull
        self.keep_alive, self.num_ctx, self.think = keep_alive, num_ctx, think
        self._entry: Mapping[str, Any] | None = None  # of the model, in the server's list

    def identity(self) -> dict[str, Any]:
        self._prepare()
        entry = self._entry or {}
        details = entry.get("details") or {}
        return {
            "kind": "ollama", "model": self.model, "revision": entry.get("digest"),
            "details": {key: details[key] for key in DESCRIBED if key in details},
            "num_ctx": self.num_ctx, "think": self.think,
        }  # fmt: skip

    def _whom(self) -> str:
        return f"Ollama at {shown(self._parts)} ({self.model})"

    def _about_keys(self) -> str:
        return "give OLLAMA_HOST or backend.host with the credentials that it asks for"

    def _about_models(self) -> str:
        return "`ollama list` shows the models that it has"

    def _connect(self) -> ollama.Client:
        from ollama import Client

        auth = credentials(self._parts)
        self._keep_secret(os.environ.get("OLLAMA_API_KEY"), auth[1] if auth else None, self._parts.password)
        return Client(shown(self._parts), auth=auth, event_hooks=self._watch.hooks)

    def _prepare(self) -> None:
        with self._lock:
            if self._entry is None:
                self._entry = self._listed()
            if self._entry is None and self.pull:
                self._call(self._fetch, endless=True)
                self._entry = self._listed()
            if self._entry is None:
                advice = self._about_models() if self.pull else f"`ollama pull {self.model}`, or set pull=true"
                raise BackendError("refused", f"{self._whom()} does not have the model: {advice}")

    def _listed(self) -> Mapping[str, Any] | None:
        def ask(attempt: Attempt) -> Mapping[str, Any] | None:
            self._watch.begin(attempt)
            wanted = (self.model, f"{self.model}:latest")
            found = [entry for entry in self._open().list().models if entry.model in wanted]
            return found[0].model_dump(mode="json", exclude_none=True) if found else None

        return self._call(ask)

    def _fetch(self, attempt: Attempt) -> None:
        """Let the server fetch the model; a download that broke off is taken up again by the next attempt."""
        from ollama import ResponseError
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        attempt.timeout = max(attempt.timeout, SILENT_PULL)
        self._watch.begin(attempt)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"fetching {self.model}", total=None)
            layers: dict[str, tuple[int, int]] = {}
            last = None
            try:
                for part in self._open().pull(self.model, stream=True):
                    last = part.status
                    if part.digest:
                        layers[part.digest] = (part.completed or 0, part.total or 0)
                        done, total = map(sum, zip(*layers.values(), strict=True))
                        progress.update(bar, completed=done, total=total)
            except ResponseError as error:
                why = f"cannot fetch the model ({self._quoted(str(error.error))})"
                raise Failure(
                    "refused", why, "see whether it is spelled right and whether the server is online"
                ) from None
        if last != "success":
            raise broken_off()

    def _pieces(self, messages: Messages, params: Params) -> Generator[Piece, None, None]:
        options: dict[str, Any] = {
            "num_predict": params.max_new_tokens, "temperature": params.temperature, "top_k": params.top_k,
            "top_p": params.top_p, "seed": params.seed,
            "min_p": 0.0, "repeat_penalty": 1.0,  # the distribution as it is, whatever the model's file asks for
        }  # fmt: skip
        if params.stop:
            options["stop"] = list(params.stop)
        if self.num_ctx is not None:
            options["num_ctx"] = self.num_ctx
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": params.logprobs} if params.logprobs else {}
        parts = self._open().chat(
            self.model, [dict(message) for message in messages], stream=True, options=options,
            keep_alive=self.keep_alive, think=self.think, **more,
        )  # fmt: skip
        try:
            for part in parts:
                yield _piece(part)
        finally:
            parts.close()

    def _vectors(self, texts: Sequence[str]) -> list[list[float]]:
        answer = self._open().embed(self.model, list(texts), keep_alive=self.keep_alive)
        return [list(vector) for vector in answer.embeddings]

    def _failure(self, error: Exception, attempt: Attempt) -> Failure:
        import httpx
        import ollama

        if isinstance(error, (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout)):
            advice = "start it with `ollama serve`, or set OLLAMA_HOST"
            return Failure("unreachable", "does not answer", advice, again=True)
        if isinstance(error, httpx.TimeoutException):
            why = f"sent nothing for {attempt.timeout:g} seconds"
            return Failure("timeout", why, "raise `timeout`: a large model takes long to load", again=True)
        if isinstance(error, httpx.RequestError):
            return broken_off()
        if isinstance(error, ollama.ResponseError):
            # -1: in the middle of a stream, behind a status of 200
            return self._refusal(error.status_code if error.status_code > 0 else 500, str(error.error), attempt)
        if attempt.status is not None and attempt.status >= 400:
            return self._refusal(attempt.status, "", attempt)
        if isinstance(error, (ValueError, TypeError, AttributeError, LookupError, RecursionError)):
            return not_understood("Ollama's API")
        raise error


def _address(host: str | None) -> SplitResult:
    """Where the server is, read as Ollama reads it."""
    key = "backend.host" if host else "OLLAMA_HOST"
    host = whole(host or os.environ.get("OLLAMA_HOST") or "127.0.0.1")
    if "://" in host:
        return parsed(host, key, EXAMPLE)
    parts = parsed(f"http://127.0.0.1{host}" if host.startswith(":") else f"http://{host}", key, EXAMPLE)
    return parts if parts.port else parts._replace(netloc=f"{parts.netloc}:{PORT}")


def _piece(part: Any) -> Piece:
    if part.message.tool_calls:
        raise called()
    finish = finish_of(part.done_reason) if part.done else None  # Ollama gives none where its runner broke off
    tokens = tuple(_token(token) for token in part.logprobs or ())
    return Piece(part.message.content or "", len(part.message.thinking or ""), tokens, finish)


def _token(token: Any) -> tuple[TokenChoice, bytes]:
    top = tuple((other.token, other.logprob) for other in token.top_logprobs or ())
    return TokenChoice(token.token, token.logprob, top), token.token.encode("utf-8", "surrogatepass")
