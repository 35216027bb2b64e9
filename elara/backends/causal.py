"""A causal language model of transformers in memory: token ids to text, log-probabilities and vectors.

The loop is our own: rows of a batch each draw from their own seed, leave when they are done, and never meet the global
random state; `generate` of transformers offers none of the three.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elara.backends.base import Answer, BackendError, Messages, Params, TokenChoice, TopLogprobs
from elara.backends.local import READ_AT_ONCE, check_ids, choices, last_text, sampling_of, seed_of, top_of
from elara.backends.stopping import StopText
from elara.decoding import SamplingConfig
from elara.decoding.sampling import draw, likeliest, marked, probabilities
from elara.errors import NotFinite
from elara.tokenizer.huggingface import HuggingFaceTokenizer

NO_NUMBERS = "the model computes nan or infinite numbers: its file is damaged, or another backend.dtype may help"


@dataclass
class Writing:
    """An answer while it grows. room: tokens that it may still get."""

    key: int
    room: int
    generator: torch.Generator
    stream: Any
    stop: StopText
    text: str = ""
    finish: str = ""
    tokens: list[TokenChoice] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of the tokens, in characters

    def answer(self) -> Answer | BackendError:
        """What was written; an error of kind `empty` when that is nothing."""
        if not self.text.strip():
            return BackendError("empty", "the model wrote nothing: raise max_new_tokens or ask otherwise")
        end = len(self.text) if self.stop.met else self.stop.fed + 1  # tokens of a stop text are left out
        return Answer(
            self.text, self.finish, tuple(t for t, at in zip(self.tokens, self.starts, strict=True) if at < end)
        )


class Causal:
    """model, tokenizer: transformers' own. ours: the same tokenizer as Elara's students have it. read_at_once: tokens
    per forward that no answer is drawn from."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ours: HuggingFaceTokenizer,
        device: torch.device,
        read_at_once: int = READ_AT_ONCE,
    ) -> None:
        self.model, self.tokenizer, self.ours, self.device = model, tokenizer, ours, device
        self._read_at_once = read_at_once
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size = int(config.vocab_size)
        named = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
        self._ends = {ours.end_id}
        for ids in named:
            self._ends |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        marked = {token for token, about in tokenizer.added_tokens_decoder.items() if about.special}
        self._silent = self._ends | marked | set(tokenizer.all_special_ids)
        self._blank = [ours.end_id if ours.end_id < self.vocab_size else 0]  # stands for a text without tokens
        self._anchor = ours.encode("a")[-1:]
        self.text_of = lru_cache(1 << 16)(self._text_of)
        self._lock = threading.RLock()  # of what is done to the model's own `forward` for a moment

    def prompt(self, messages: Messages) -> list[int]:
        """The ids of a conversation by the chat template; without one, of its last text, to be continued.

        Raises BackendError of kind `unfit` for what the template refuses and for what leaves no room in the context.
        """
        text = last_text(messages)
        try:
            "".join(str(message.get("content")) for message in messages).encode()
        except UnicodeEncodeError as error:
            raise BackendError(
                "unfit", "the conversation holds half a character (a lone surrogate): mend it"
            ) from error
        ids = (self._templated(messages) if self.tokenizer.chat_template else self._continued(text)) or self._blank
        if self.context is not None and len(ids) >= self.context:
            raise BackendError(
                "unfit", f"the prompt has {len(ids)} tokens, the model's context holds {self.context}: shorten it"
            )
        return ids

    def _templated(self, messages: Messages) -> list[int]:
        """A conversation's ids. A special token that somebody wrote is plain text, as it is to a student: frame and
        contents are tokenised apart then; else as the template's authors did, who may have let them share a token."""
        if not any(self._holds_special(message.get("content")) for message in messages):
            return list(templated(self.tokenizer, messages, add_generation_prompt=True, return_dict=False))
        first, *others = frame(self.tokenizer, [message["role"] for message in messages], answering=True)
        contents = [self.ours.encode(last_text([message])) for message in messages]
        return first + [token for pair in zip(contents, others, strict=True) for part in pair for token in part]

    def _holds_special(self, text: str | None) -> bool:
        return not self._silent.isdisjoint(self.tokenizer(text or "", add_special_tokens=False)["input_ids"])

    def _continued(self, text: str) -> list[int]:
        """A text's ids: what the tokenizer puts before every text, the text as plain text, and no end after it."""
        given = self.tokenizer("a", return_special_tokens_mask=True)
        marked = zip(given["input_ids"], given["special_tokens_mask"], strict=True)
        return [token for token, _ in itertools.takewhile(lambda pair: pair[1], marked)] + self.ours.encode(text)

    def write(self, prompts: Sequence[list[int]], params: Params) -> Iterator[tuple[Writing, str]]:
        """Answer all prompts together: (answer so far, its next piece), a finished answer's last with `finish` set."""
        from transformers import DynamicCache

        sampling = sampling_of(params)
        rows = [self._begin(key, prompt, params) for key, prompt in enumerate(prompts)]
        tokens, mask = _left_padded(prompts)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        while True:
            with torch.no_grad(), self._lock:
                logits = self.model(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1,
                ).logits[:, -1].float()  # fmt: skip
                drawn = [self._draw(row, logits[i], sampling) for i, row in enumerate(rows)]
            for i, (row, token) in enumerate(zip(rows, drawn, strict=True)):
                yield row, self._extend(row, token, logits[i], params)
            going = [i for i, row in enumerate(rows) if not row.finish]
            if not going:
                return
            if len(going) < len(rows):
                rows, keep = [rows[i] for i in going], torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                mask, positions = mask[keep], positions[keep]
            tokens = torch.tensor([[drawn[i]] for i in going], device=self.device)
            mask = F.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1

    def _begin(self, key: int, prompt: list[int], params: Params) -> Writing:
        room = params.max_new_tokens if self.context is None else min(params.max_new_tokens, self.context - len(prompt))
        generator = torch.Generator().manual_seed(seed_of(params, prompt))
        return Writing(key, room, generator, self.ours.stream_decoder(), StopText(params.stop))

    def _draw(self, row: Writing, logits: Tensor, sampling: SamplingConfig) -> int:
        """A token from logits (vocab); raises NotFinite where they are nan or infinite."""
        if sampling.temperature == 0:
            token = int(marked(*likeliest(logits), len(logits)))
        else:
            uniform = torch.rand((), generator=row.generator).to(self.device)
            token = int(draw(probabilities(logits, sampling), uniform))
        if token == len(logits):
            raise NotFinite(NO_NUMBERS)
        return token

    def _extend(self, row: Writing, token: int, logits: Tensor, params: Params) -> str:
        """Add a token to a row; the text that became certain with it. logits: (vocab), what it was drawn from."""
        row.room -= 1
        piece = ""
        if token in self._ends:
            row.finish = "stop"
        else:
            if params.logprobs:
                row.starts.append(row.stop.fed)
                row.tokens += choices(logits[None], [token], params.logprobs, self.text_of)
            if token not in self._silent:
                piece = row.stop.feed(row.stream.feed(token))
            if row.stop.met:
                row.finish = "stop"
            elif row.room == 0:
                row.finish = "length"
        if row.finish and not row.stop.met:
            tail = row.stream.flush().rstrip("\ufffd")  # a character that was cut off is left out
            piece += row.stop.feed(tail) + row.stop.flush()
        row.text += piece
        return piece

    def _text_of(self, token: int) -> str:
        """A token's text inside a text: none of a special token, U+FFFD where it is no whole character."""
        known = self.tokenizer.decode(self._anchor)
        return str(self.tokenizer.decode([*self._anchor, token], skip_special_tokens=True)[len(known) :])

    def top_logprobs(self, ids: Tensor, k: int, temperature: float = 1.0) -> TopLogprobs:
        """See Backend. Raises BackendError `refused` for ids outside the vocabulary and rows beyond the context."""
        check_ids(ids, self.vocab_size, self.context)
        parts = ids.to(self.device).split(max(1, self._read_at_once // ids.shape[1]))
        shape: Any = None  # of what the blocks return, beside the hidden states

        def hidden() -> Iterator[Tensor]:
            nonlocal shape
            for part in parts:
                shape = self.model.base_model(input_ids=part, use_cache=False)
                yield shape.last_hidden_state.flatten(0, 1)  # (batch * seq, n_embd)

        with torch.no_grad(), self._lock:
            return top_of(hidden(), lambda some: self._logits(shape, some), k, ids, temperature)

    def _logits(self, output: Any, hidden: Tensor) -> Tensor:
        """(positions, vocab) of hidden states (positions, n_embd) out of `output`.

        By the whole model with its blocks stepped over: some models scale or cap what the head gives.
        """
        base = self.model.base_model
        given = type(output)(**{**output, "last_hidden_state": hidden[None]})
        base.forward = lambda *_, **__: given
        try:
            logits: Tensor = self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits[0]
        finally:
            del base.forward
        return logits

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The mean of the last hidden states over a text's tokens, at unit length."""
        ids = [(self.ours.encode(text) or self._blank)[: self.context] for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors: list[Tensor] = [torch.empty(0)] * len(ids)
        with torch.no_grad(), self._lock:
            while order:
                count = max(1, self._read_at_once // len(ids[order[-1]]))
                part, order = order[-count:], order[:-count]
                tokens, mask = (x.to(self.device) for x in _left_padded([ids[i] for i in part]))
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                hidden = self.model.base_model(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
                ).last_hidden_state.float()  # (texts, seq, n_embd)
                mean = (hidden * mask[..., None]).sum(1)
                for i, vector in zip(part, F.normalize(mean, dim=-1).cpu(), strict=True):
                    vectors[i] = vector
        found = torch.stack(vectors) if vectors else torch.zeros(0, self.width)
        if not found.isfinite().all():
            raise NotFinite(NO_NUMBERS)
        return found.numpy()

    @property
    def width(self) -> int:
        """Of hidden states."""
        return int(self.model.config.get_text_config().hidden_size)


def frame(tokenizer: Any, roles: Sequence[str], *, answering: bool = False) -> list[list[int]]:
    """See Backend: what the chat template of transformers' `tokenizer` writes around messages that are marks.

    answering: with the beginning of the assistant's answer after the last one.
    """
    if not tokenizer.chat_template:
        raise BackendError("refused", "the model has no chat template")
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    text, around = templated(tokenizer, messages, add_generation_prompt=answering, tokenize=False), list[str]()
    for mark in marks:
        before, found, text = text.partition(mark)
        around.append(before if found else mark)
    around.append(text)
    if any("\ue000" in part for part in around):
        raise BackendError("unfit", f"the model's chat template does not write {', '.join(roles)} one by one")
    return [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in around]


def templated(tokenizer: Any, messages: Messages, **options: Any) -> Any:
    """The conversation by transformers' chat template. Raises BackendError of kind `unfit` where that refuses it."""
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except Exception as error:  # the template is a program of the model's authors, and raises what it likes
        reason = " ".join(str(error).split())[:120]
        raise BackendError("unfit", f"the model's chat template refuses the conversation: {reason}") from error


def _left_padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, int64 (rows, longest); padding is id 0, unseen."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask
