"""Any server with OpenAI's API, through the official client: vLLM, llama.cpp, LM Studio, OpenAI itself."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elara.backends.base import BackendError, Messages, Params, TokenChoice
from elara.backends.retry import Attempt, Failure, Limits
from elara.backends.server import Server, broken_off, credentials, not_understood, parsed, shown
from elara.backends.writing import Piece, called, finish_of

if TYPE_CHECKING:
    import openai

NO_KEY = "EMPTY"  # what local servers take for a key
STOPS = 4  # texts that the API takes; the rest are cut off here
# Fields that a server may refuse and the answer means the same: `top_k` where it is 0, `max_tokens` under its new name.
OPTIONAL = ("min_p", "top_k", "seed", "max_tokens")
DESCRIBED = ("owned_by", "root", "max_model_len", "meta")  # of a model's entry; the rest changes from call to call


class OpenAICompatible(Server):
    """A model behind a server with OpenAI's API.

    Args:
        model: its name there; None = the only one that the server has.
        base_url: of the API, as in http://127.0.0.1:8000/v1.
        api_key_env: the environment variable that holds the key; without one, local servers are content.
        extra: fields added to every request for an answer, as in {"chat_template_kwargs": {"enable_thinking": False}}.
        concurrency, timeout, deadline, retries, retry_delay, max_characters, requests_per_minute: see `Limits`.
    """

    def __init__(
        self, model: str | None, base_url: str, api_key_env: str = "OPENAI_API_KEY", *, concurrency: int = 4,
        timeout: float = 60.0, deadline: float = 600.0, retries: int = 4, retry_delay: float = 0.5,
        max_characters: int = 100_000, requests_per_minute: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._parts = parsed(base_url, "backend.base_url", "http://host:port/v1")
        limits = Limits(timeout, deadline, retries, retry_delay, max_characters, requests_per_minute)
        super().__init__(limits, concurrency)
        self.model, self.api_key_env = model, api_key_env
        self.extra = dict(extra or {})
        self._without: set[str] = set()  # optional fields that the server refused

    def identity(self) -> dict[str, Any]:
        self._prepare()
        found: dict[str, Any] = {
            "kind": "openai_compatible", "base_url": shown(self._parts), "model": self.model, "revision": None,
            "extra": self.extra,
        }  # fmt: skip
        try:
            entry = next((entry for entry in self._models() if entry.get("id") == self.model), {})
        except BackendError as error:
            if error.kind not in ("refused", "failed", "unfit"):
                raise
            entry = {}  # not every gateway lists its models
        return found | {"server": {key: entry[key] for key in DESCRIBED if entry.get(key) is not None}}

    def _whom(self) -> str:
        return f"{self.model or 'the model'} at {shown(self._parts)}"

    def _about_keys(self) -> str:
        return f"put a key that is good there into the environment variable {self.api_key_env}"

    def _about_models(self) -> str:
        return "see which models it has (GET /models), and whether base_url ends as it should, mostly in /v1"

    def _connect(self) -> openai.OpenAI:
        from openai import DefaultHttpxClient, OpenAI

        key = os.environ.get(self.api_key_env, "").strip() or NO_KEY
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise BackendError("refused", f"the key in {self.api_key_env} has signs that no key has: set it anew")
        auth = credentials(self._parts)
        self._keep_secret(key if key != NO_KEY else None, auth[1] if auth else None, self._parts.password)
        client = DefaultHttpxClient(auth=auth, event_hooks=self._watch.hooks)
        return OpenAI(api_key=key, base_url=shown(self._parts), max_retries=0, http_client=client)

    def _prepare(self) -> None:
        self._open()
        with self._lock:
            if self.model is None:
                names = sorted(str(entry.get("id")) for entry in self._models())
                if len(names) != 1:
                    listed = ", ".join(names) or "none"
                    raise BackendError(
                        "refused", f"{self._whom()} is one of several or missing ({listed}): name it in `model`"
                    )
                self.model = names[0]

    def _models(self) -> list[dict[str, Any]]:
        def ask(attempt: Attempt) -> list[dict[str, Any]]:
            self._watch.begin(attempt)
            page = self._open().models.list()
            self._check(page.model_extra)
            return [entry.to_dict(mode="json") for entry in page.data]

        return self._call(ask)

    def _pieces(self, messages: Messages, params: Params) -> Generator[Piece, None, None]:
        stream = self._start(messages, params)
        try:
            if (whole := _not_streamed(stream.response)) is not None:
                yield self._whole(whole)
                return
            for chunk in stream:
                if chunk.choices:
                    yield _piece(chunk.choices[0], chunk.choices[0].delta)
        finally:
            stream.close()

    def _whole(self, body: dict[str, Any]) -> Piece:
        """An answer of a server that does not stream."""
        from openai.types.chat import ChatCompletion

        self._check(body)
        choice = ChatCompletion.construct(**body).choices[0]
        return _piece(choice, choice.message)

    def _check(self, body: Mapping[str, Any] | None) -> None:
        """Raise Failure where a body is an error in spite of the status 200, as of LM Studio without /v1."""
        error = (body or {}).get("error")
        if error:
            said = self._quoted(str(error.get("message") or error) if isinstance(error, dict) else str(error))
            raise Failure("refused", f"answered 200 with an error ({said})", self._about_models())

    def _start(self, messages: Messages, params: Params) -> openai.Stream[Any]:
        from openai import BadRequestError, UnprocessableEntityError

        asked: Any = [dict(message) for message in messages]
        without = set(self._without)
        while True:
            fields = self._fields(params, without)
            try:
                stream: openai.Stream[Any] = self._open().chat.completions.create(
                    model=self.model or "", messages=asked, stream=True, extra_body=fields
                )
            except (BadRequestError, UnprocessableEntityError) as error:
                refused = self._refused(str(error.body or error.message), params, fields, without)
                if refused is None:
                    raise
                without.add(refused)
            else:
                self._without |= without  # it was them, as the answer comes without
                return stream

    def _refused(self, said: str, params: Params, fields: Mapping[str, Any], without: set[str]) -> str | None:
        """The field that the server's words are about, if the answer means the same without it."""
        for name in OPTIONAL:
            if name in said and name in fields and name not in without and name not in self.extra:
                if name == "top_k" and params.top_k:
                    continue
                if name == "max_tokens" and "max_completion_tokens" not in said:
                    continue
                return name
        return None

    def _fields(self, params: Params, without: set[str]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "max_tokens": params.max_new_tokens, "temperature": params.temperature, "seed": params.seed,
        }  # fmt: skip
        if params.temperature > 0:  # servers of open models cut the distribution unless they are told not to
            fields |= {"top_p": params.top_p, "top_k": params.top_k, "min_p": 0.0}
        if params.stop:
            fields["stop"] = list(params.stop[:STOPS])
        if params.logprobs:
            fields |= {"logprobs": True, "top_logprobs": params.logprobs}
        dropped = without - {"top_k"} if params.top_k else without
        kept = {name: value for name, value in fields.items() if name not in dropped}
        if "max_tokens" in without:
            kept["max_completion_tokens"] = params.max_new_tokens
        return kept | self.extra

    def _vectors(self, texts: Sequence[str]) -> list[list[float]]:
        answer = self._open().embeddings.create(model=self.model or "", input=list(texts), encoding_format="float")
        self._check(answer.model_extra)
        return [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]

    def _failure(self, error: Exception, attempt: Attempt) -> Failure:
        import openai

        cause = error.__cause__
        name = type(cause).__name__  # of httpx or httpx2, as the client's version has it
        if name in ("ConnectError", "ConnectTimeout"):
            why = self._quoted(str(cause)) or "no answer"
            return Failure(
                "unreachable", f"cannot be reached ({why})", "start the server, or correct base_url", again=True
            )
        if isinstance(error, openai.APITimeoutError):
            why = f"sent nothing for {attempt.timeout:g} seconds"
            return Failure("timeout", why, "raise `timeout`, or ask for less at once", again=True)
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error.status_code, _said(error), attempt, field=_field(error))
        if isinstance(error, openai.APIConnectionError):
            return broken_off()
        if isinstance(error, openai.APIError):  # in the middle of a stream
            return self._refusal(_code(error) or 500, _said(error), attempt)
        if isinstance(error, UnicodeDecodeError):
            return Failure("not_text", "sent bytes that are not UTF-8", "look at what answers there")
        if isinstance(error, (ValueError, TypeError, AttributeError, LookupError, RecursionError)):
            return not_understood("OpenAI's API")
        raise error


def _not_streamed(response: Any) -> dict[str, Any] | None:
    """The body of a response that is one JSON object instead of a stream."""
    if response.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return None
    with contextlib.suppress(ValueError):  # a stream under a wrong name: it can still be read as one
        body = json.loads(response.read())
        return body if isinstance(body, dict) else None
    return None


def _piece(choice: Any, message: Any) -> Piece:
    """message: what the choice brings of its message, None = nothing."""
    finish = finish_of(choice.finish_reason)
    if message is None:
        return Piece(finish=finish)
    if message.tool_calls or message.function_call:
        raise called()
    extra = message.model_extra or {}
    thought = extra.get("reasoning_content") or extra.get("reasoning") or ""
    text, thoughts = _words(message.content)
    logprobs = choice.logprobs.content if choice.logprobs is not None else None
    return Piece(text, len(thought) + thoughts, tuple(_token(token) for token in logprobs or ()), finish)


def _words(content: Any) -> tuple[str, int]:
    """The text of a message's content, which comes whole or in parts, and the characters of thoughts in it."""
    if not isinstance(content, list):
        return content or "", 0
    text, thoughts = "", 0
    for part in content:
        if part["type"] == "thinking":
            thoughts += len(str(part["thinking"]))
        else:
            text += part["text"]
    return text, thoughts


def _token(token: Any) -> tuple[TokenChoice, bytes]:
    top = tuple((str(other.token), float(other.logprob)) for other in token.top_logprobs or ())
    raw = bytes(token.bytes) if token.bytes is not None else token.token.encode("utf-8", "surrogatepass")
    return TokenChoice(token.token, float(token.logprob), top), raw


def _said(error: openai.APIError) -> str:
    """The server's own words; the code with them, which says more than the number of the status."""
    body = error.body
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail") or body
        return f"{message} {error.code}" if error.code and not error.code.isdigit() else str(message)
    return str(body) if body else error.message


def _field(error: openai.APIStatusError) -> str | None:
    return error.param if error.param and not error.param.startswith(("messages", "prompt", "input")) else None


def _code(error: openai.APIError) -> int | None:
    return int(error.code) if error.code and error.code.isdigit() else None
