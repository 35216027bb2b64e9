"""The teachers at work, a thread each: every answer goes into the store before anything else happens to it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from elara.backends import Answer, Backend, BackendError, Params
from elara.collect.config import THREAD
from elara.collect.prompts import Prompt
from elara.collect.store import Store, answer_id, answer_sample
from elara.data.hashes import digest
from elara.data.samples import Sample
from elara.errors import ElaraError, NotFinite

LASTING = 3  # failures in a row of a kind that lasts that end a teacher: one may be about a single prompt
SYNC = 0.5  # seconds between syncs of the store
GRACE = 5.0  # seconds that answers in flight get when the user interrupts


@dataclass
class Teacher:
    """A teacher and how it does; the thread that asks it writes, the others read."""

    name: str
    backend: Backend
    weight: float
    prompts: Sequence[Prompt]  # its part of them
    before: int = 0  # answers that the store had already
    answered: int = 0
    characters: int = 0
    tokens: int = 0  # where it shows them
    failed: Counter[str] = field(default_factory=Counter)  # by kind
    dropped: str | None = None  # why it was not asked to the end
    started: float | None = None
    seconds: float = 0.0  # from the first question to the last answer

    @property
    def open(self) -> int:
        """Prompts that are neither answered nor failed."""
        return len(self.prompts) - self.before - self.answered - self.failed.total()


def share_of(name: str, weights: dict[str, float], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that fall to a teacher when each goes to one, drawn by weight from the hash of prompt and name.

    Weighted rendezvous hashing: when a teacher comes or goes, only prompts that it wins or had move.
    """

    def distance(prompt: Prompt, teacher: str) -> float:
        drawn = (int(digest([prompt.id, teacher])[:13], 16) + 0.5) / 16**13  # uniform in (0, 1)
        return -math.log(drawn) / weights[teacher]

    running = [teacher for teacher in sorted(weights) if weights[teacher] > 0]
    return [prompt for prompt in prompts if min(running, key=lambda teacher: distance(prompt, teacher)) == name]


class Asking:
    """All teachers, asked at once until everything is answered, the time is up or nobody is left.

    give_up: failures in a row that end a teacher. say: shows a line to the user, from any thread.
    """

    def __init__(
        self, store: Store, teachers: Sequence[Teacher], params: Params, give_up: int, say: Callable[[str], None]
    ) -> None:
        self.teachers = teachers
        self._store, self._params, self._give_up, self._say = store, params, give_up, say
        self._stop = threading.Event()
        self._broken: BaseException | None = None  # of the store
        self._identities: dict[str, str] = {}  # hash: name
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(teacher,), daemon=True, name=THREAD + teacher.name)
            for teacher in teachers
        ]

    def run(self, tick: Callable[[], None], seconds: float | None = None) -> bool:
        """Ask until the end; returns False when the time ran out first.

        tick: called twice a second. Raises what broke the store; a KeyboardInterrupt waits for what is in flight.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        in_time = True
        for thread in self._threads:
            thread.start()
        try:
            while self._wait(SYNC):
                self._store.sync()
                tick()
                if self._broken is not None:
                    break
                if time.monotonic() > end:
                    self._stop.set()
                    self._wait(GRACE)
                    in_time = False
                    break
        except KeyboardInterrupt:
            self._stop.set()
            self._say("stopping: answers in flight are waited for (once more: at once)")
            self._wait(GRACE)
            raise
        finally:
            self._stop.set()
            self._store.sync()
            tick()
        if self._broken is not None:
            raise self._broken
        return in_time

    def close(self) -> None:
        """Let the teachers go; one that still answers is left to end with the process."""
        for thread, teacher in zip(self._threads, self.teachers, strict=True):
            if not thread.is_alive():
                teacher.backend.close()

    def _wait(self, seconds: float) -> bool:
        """Wait for the threads; returns whether one still works."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return any(thread.is_alive() for thread in self._threads)

    def _work(self, teacher: Teacher) -> None:
        try:
            self._ask(teacher)
        except BackendError as error:
            self._drop(teacher, f"{error.kind}: {error}")
        except NotFinite as error:
            self._throw_away(teacher, error)
        except ElaraError as error:
            self._drop(teacher, str(error))
        except _Broken as error:
            self._broken = error.__cause__
        except Exception as error:  # a backend's own mistake must not end the others
            self._drop(teacher, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _ask(self, teacher: Teacher) -> None:
        identity = teacher.backend.identity()
        own = digest(identity)
        with self._lock:
            if (other := self._identities.setdefault(own, teacher.name)) != teacher.name:
                raise ElaraError(f"it is the same model as {other}: name each once")
        params = self._params  # as asked for: what a teacher cannot do must not make its answers others
        waiting = [prompt for prompt in teacher.prompts if answer_id(prompt, own, params) not in self._store]
        teacher.before = len(teacher.prompts) - len(waiting)
        if not waiting or self._stop.is_set():
            return
        teacher.started = time.monotonic()
        row = 0  # failures in a row
        answers = teacher.backend.answers([prompt.messages for prompt in waiting], self._possible(teacher))
        for index, result in answers:
            if isinstance(result, Answer):
                result = _checked(result, teacher.name)
            if isinstance(result, Answer):
                row = 0
                sample = answer_sample(waiting[index], result, teacher.name, identity, params, teacher.weight)
                if self._keep(sample):
                    teacher.answered += 1
                    teacher.characters += len(result.text)
                    teacher.tokens += len(result.tokens)
            else:
                row += 1
                teacher.failed[result.kind] += 1
            teacher.seconds = time.monotonic() - teacher.started
            if isinstance(result, BackendError) and row >= (LASTING if result.lasting else self._give_up):
                raise BackendError(result.kind, f"{result} ({row} failures in a row)")
            if self._stop.is_set():
                return

    def _possible(self, teacher: Teacher) -> Params:
        wanted = self._params.logprobs
        if not wanted:  # to know what it can do, a server may have to be asked
            return self._params
        possible = min(wanted, teacher.backend.capabilities.token_logprobs)
        if possible < wanted:
            self._say(f"{teacher.name} shows {possible} of the {wanted} log-probabilities asked for per token")
        return replace(self._params, logprobs=possible)

    def _drop(self, teacher: Teacher, why: str) -> None:
        teacher.dropped = why
        others = "; the others go on" if any(t.dropped is None for t in self.teachers) else ""
        self._say(f"{teacher.name} is dropped after {teacher.answered:,} answers, {why}{others}")

    def _throw_away(self, teacher: Teacher, error: NotFinite) -> None:
        """Drop a teacher whose numbers are none: what it answered before came of the same weights."""
        try:
            gone = self._store.discard(digest(teacher.backend.identity()))
        except OSError as broken:
            self._broken = broken
            return
        teacher.answered = teacher.before = 0
        self._drop(teacher, f"{error}; its answers are thrown away, {gone:,} in the store")

    def _keep(self, sample: Sample) -> bool:
        try:
            return self._store.append(sample)
        except OSError as error:
            raise _Broken from error


class _Broken(Exception):
    """The store cannot be written to, which ends all teachers."""


def _checked(answer: Answer, name: str) -> Answer | BackendError:
    """What a backend let through and a store cannot hold."""
    if not answer.text.strip():
        return BackendError("empty", f"{name} answered nothing")
    try:
        answer.text.encode()
    except UnicodeEncodeError:
        return BackendError("not_text", f"{name} answered with broken characters")
    return answer
