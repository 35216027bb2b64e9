"""Learning from teachers: their opinions on a run's text, stored before it or asked for at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor

from elara.backends import Backend, BackendError
from elara.backends.elara import Elara
from elara.data.batches import PADDING, Batch
from elara.data.opinions import StoredOpinion
from elara.decoding import SamplingConfig, generate, writable
from elara.errors import ElaraError, NotFinite
from elara.model import ElaraLM
from elara.ranges import check_ranges
from elara.runs import python
from elara.tokenizer import Tokenizer
from elara.training.config import DistillConfig
from elara.training.divergence import KINDS
from elara.training.losses import Lesson, Opinion
from elara.training.projection import Projection

CHOICES = ("weights", "lowest_perplexity")
OPINIONS = ("stored", "live")


@dataclass
class Teacher:
    """A teacher of a run. weight: its share of all; projection: of what it reads otherwise than the student."""

    name: str
    weight: float
    backend: Backend
    student: Tokenizer
    projection: Projection | None = None
    broken: Tensor | None = None  # whether it ever said what is no number; on the device, where nobody waits for it

    def opinion(self, rows: Tensor, settings: DistillConfig) -> StoredOpinion:
        """Behind every token of `rows`, int64 (batch, seq), PADDING behind an end; nothing follows the last one."""
        other = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)  # rows that it reads in tokens of its own
        if self.projection is not None:
            roles = torch.tensor(list(self.student.role_ids.values()), device=rows.device)
            other = torch.isin(rows, roles).any(1) if self.projection.same else ~other
        parts, places = list[StoredOpinion](), torch.arange(len(rows), device=rows.device)
        try:
            with torch.autocast(rows.device.type, enabled=False):  # it has a precision of its own
                if self.projection is not None and other.any():
                    parts.append(self.projection.opinion(rows[other], settings.top_k, settings.temperature))
                if not other.all():
                    parts.append(self._direct(rows[~other], settings))
        except BackendError as error:
            how = "distill.context and data.seq say how much it reads at once"
            raise BackendError(error.kind, f"teachers.{self.name}: {error} ({how})") from error
        order = torch.cat([places[other], places[~other]]).argsort()
        return StoredOpinion(*(torch.cat(values)[order] for values in zip(*parts, strict=True)))

    def watch(self, said: StoredOpinion) -> None:
        """Remember, for `check`, whether what it says of a batch is nan."""
        broken = said.logprobs.isnan().any()
        self.broken = broken if self.broken is None else self.broken | broken

    def check(self) -> None:
        """Raise NotFinite when anything that was watched is nan; waits for the device."""
        if self.broken is not None and bool(self.broken):
            raise NotFinite(
                f"teachers.{self.name} says nan instead of log-probabilities: its model is damaged, or another "
                "backend.dtype may help"
            )

    def note(self, conversations: bool) -> str | None:
        """What a user should know about how it reads; None when it reads as the student does."""
        if self.projection is None or (self.projection.same and not conversations):
            return None
        if self.projection.same:
            return f"{self.name} reads conversations in its own chat template"
        return f"{self.name} has another tokenizer: what it says is put into the student's tokens"

    def _direct(self, rows: Tensor, settings: DistillConfig) -> StoredOpinion:
        said = self.backend.top_logprobs(rows.clamp(min=0), settings.top_k, settings.temperature)
        following = F.pad(said.following.masked_fill(rows[:, 1:] < 0, math.nan), (0, 1), value=math.nan)
        known = (said.ids < self.student.plain_size) | (said.ids == self.student.end_id)  # not ours, nor padding
        lost = said.logprobs.masked_fill(known, -torch.inf).logsumexp(-1)
        ids, logprobs = said.ids.masked_fill(~known, -1), said.logprobs.masked_fill(~known, -torch.inf)
        missing = (0, settings.top_k - ids.shape[-1])
        ids, logprobs = F.pad(ids, missing, value=-1), F.pad(logprobs, missing, value=-torch.inf)
        logprobs = torch.cat([logprobs, torch.logaddexp(said.rest, lost)[..., None]], -1)
        return StoredOpinion(ids, logprobs, following)


class Teaching:
    """What the teachers of a run say about its batches: what the batches bring along, or, live, what they answer."""

    def __init__(self, teachers: Sequence[Teacher], settings: DistillConfig) -> None:
        check(settings)
        self.teachers, self.settings = teachers, settings
        total = sum(teacher.weight for teacher in teachers)
        self._weights = [teacher.weight / total for teacher in teachers]

    def figures(self, drafts: bool) -> list[str]:
        """Names of the teachers' losses, as `Losses.teachers` has them. drafts: the model has a diffusion head."""
        names = [teacher.name for teacher in self.teachers]
        return names + [f"{name}_diffusion" for name in names if drafts and self.settings.diffusion]

    def check(self) -> None:
        """Raise NotFinite, naming the teacher, when one said what is no number; waits for the device."""
        for teacher in self.teachers:
            teacher.check()

    def lesson(self, batch: Batch) -> Lesson:
        """What is to be learned about a batch; with the text's own loss, unless the student wrote it."""
        said = list(batch.opinions) or self._ask(batch.tokens)
        for teacher, each in zip(self.teachers, said, strict=True):
            teacher.watch(each)
        settings = self.settings
        shares = self._shares(said, batch)
        opinions = [
            Opinion(teacher.name, each.ids, each.logprobs, share)
            for teacher, each, share in zip(self.teachers, said, shares, strict=True)
        ]
        return Lesson(opinions, settings.divergence, settings.temperature, settings.weight, settings.diffusion)

    def on_policy(self, model: ElaraLM, tokenizer: Tokenizer, batch: Batch, seed: int) -> tuple[Batch, Lesson]:
        """Windows whose second half the student writes; that half is learned, and from the teachers alone.

        Row r draws from seed + r.

        On-policy distillation (GKD, arXiv 2306.13649, algorithm 1): what it will meet when it writes, and no gradient
        through the drawing.
        """
        width = batch.tokens.shape[1]
        prompts = [[token for token in row if token >= 0][: width // 2] for row in batch.tokens.tolist()]
        more = width - width // 2
        sampling = SamplingConfig(temperature=1.0, max_new_tokens=more, seed=seed, stop=[tokenizer.end_id])
        rows = [list(prompt) for prompt in prompts]
        allowed = writable(tokenizer, model.config.vocab_size).to(batch.tokens.device)
        with torch.autocast(batch.tokens.device.type, enabled=False):
            for step in generate(model, prompts, sampling, mode="ar", allowed=allowed):
                for row, new in zip(rows, step.tokens, strict=True):
                    row += new
        tokens, weights = torch.full((len(rows), width), PADDING), torch.zeros(len(rows), width)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            weights[i, len(prompt) : len(row)] = 1.0
        written = Batch(tokens.to(batch.tokens.device), weights.to(batch.tokens.device))
        return written, replace(self.lesson(written), weight=1.0, written=True)

    def _ask(self, tokens: Tensor) -> list[StoredOpinion]:
        return [teacher.opinion(tokens[:, :-1], self.settings) for teacher in self.teachers]

    def _shares(self, said: Sequence[StoredOpinion], batch: Batch) -> Tensor:
        """(teachers, batch), each row's adding up to 1."""
        rows = len(batch.tokens)
        if self.settings.choice == "weights":
            return torch.tensor(self._weights, device=batch.tokens.device)[:, None].expand(-1, rows)
        surprise = torch.stack([-each.following[:, :-1] for each in said])  # live, none know what followed the last
        known = ~surprise.isnan() & (batch.tokens[:, 1:-1] >= 0)
        silent = ~known.any(2)  # (teachers, batch)
        counts = (known | silent[..., None]).all(0)  # where all have an opinion that have any
        total = surprise.masked_fill(~known | ~counts, 0.0).sum(2).masked_fill(silent, torch.inf)
        return torch.zeros_like(total).scatter(0, total.argmin(0, keepdim=True), 1.0)


def check(settings: DistillConfig) -> None:
    """Raise ElaraError for a setting that makes no sense, by its key."""
    for key, choices in (("divergence", KINDS), ("choice", CHOICES), ("opinions", OPINIONS)):
        if (value := getattr(settings, key)) not in choices:
            raise ElaraError(f"distill.{key}={value} is unknown: use {', '.join(choices)}")
    check_ranges({"distill": asdict(settings)})


def open_teachers(
    teachers: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, *, conversations: bool = False
) -> list[Teacher]:
    """Teachers of a configuration whose log-probabilities a student with this tokenizer can learn from.

    conversations: the text has roles, which are tokens of ours.

    Raises:
        ElaraError: one that gives none, does not show its tokenizer or cannot read the roles; no checkpoint where one
            is needed; a weight that is not above 0.
    """
    found = []
    for name, settings in teachers.items():
        weight = float(settings["weight"])
        if not 0 < weight < math.inf:
            raise ElaraError(f"teachers.{name}.weight={weight} must be a number above 0")
        if settings["backend"].get("checkpoint", name) is None:
            raise ElaraError(f"teachers.{name}.backend.checkpoint must be given: the newest may be the student's")
        backend: Backend = instantiate(settings["backend"])
        advice = f"collect its text instead: {python()} -m elara.collect teacher=[{name}]"
        if not backend.capabilities.logits:
            raise ElaraError(f"teachers.{name} gives no log-probabilities of a given text: {advice}")
        projection = None
        if backend.fingerprint != tokenizer.fingerprint or not isinstance(backend, Elara):
            if (theirs := backend.tokenizer()) is None:
                raise ElaraError(f"teachers.{name} does not show its tokenizer: {advice}")
            projection = Projection(backend, theirs, tokenizer)
            if conversations:
                try:
                    backend.frame(("user", "assistant"))
                except BackendError as error:
                    raise ElaraError(f"teachers.{name} cannot read conversations ({error}): {advice}") from error
        found.append(Teacher(name, weight, backend, tokenizer, projection))
    return found
