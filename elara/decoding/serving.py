"""Many requests on one model: they join a running batch between its steps and leave it when they are written.

One thread owns the engine. What a request writes is what `generate` writes for it alone: its random numbers are its
own, and no group of masks is shared. Only a controller looks at all rows together: under one a sampled request still
follows the AR distribution exactly, but does not repeat its text, as greedy and `ar` requests always do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from elara.config import SamplingConfig
from elara.decoding.controller import Controller
from elara.decoding.engine import Engine, Row
from elara.decoding.generation import check_request, fixed_plan, move, new_row, resolve_mode
from elara.decoding.inference import inference
from elara.decoding.prefix import Prefixes
from elara.errors import ElaraError, NotFinite
from elara.model import ElaraLM


@dataclass
class _Request:
    """A row and the way back to its caller: lists of tokens, then None or the error that ended it."""

    row: Row
    outbox: SimpleQueue[list[int] | Exception | None] = field(default_factory=SimpleQueue)
    cancelled: bool = False


class Stream:
    """The token ids of one request, as they are written; for one thread to iterate over. Dropping it cancels."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._ready: deque[int] = deque()
        self._over = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        """The next token id; waits for it. Raises, in the caller's thread, what stopped the server, or NotFinite, which
        ends this request alone."""
        while not self._ready:
            if self._over:
                raise StopIteration
            news = self._request.outbox.get()
            if isinstance(news, list):
                self._ready.extend(news)
                continue
            self._over = True
            if news is not None:
                raise news
        return self._ready.popleft()

    def cancel(self) -> None:
        """Write no more: the stream ends behind what is written already, and the slot goes to the next request."""
        self._request.cancelled = True

    def __del__(self) -> None:
        self.cancel()


class Server:
    """Serve requests from any number of threads; `close` it, or use it as a context manager.

    slots: requests written at the same time; others wait in the order in which they came. mask_id, allowed, depth,
    prefixes: as for `generate`, the same for all requests. controller: sets the pace of requests in mode tidar, and is
    this server's alone; or several by the number of rows that their costs were measured at, of which the first that is
    large enough for the rows in flight decides. Without one `auto` means ar, and tidar the trained draft length with a
    group behind every token. Raises ElaraError as `generate` does.
    """

    def __init__(
        self,
        model: ElaraLM,
        *,
        slots: int = 16,
        mask_id: int | None = None,
        allowed: Tensor | None = None,
        depth: int | None = None,
        controller: Controller | Mapping[int, Controller] | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        if slots < 1:
            raise ElaraError(f"slots={slots} must be at least 1: how many requests are written at the same time")
        self.model, self.mask_id, self.allowed, self.depth = model, mask_id, allowed, depth
        controllers = {slots: controller} if isinstance(controller, Controller) else dict(controller or {})
        self._controllers = [controllers[rows] for rows in sorted(controllers)]
        self._sizes = sorted(controllers)
        length = model.config.tidar.block_length
        longest = max([length, *(each.longest for each in self._controllers)])
        self._fixed = fixed_plan(SamplingConfig(), max(1, length))
        room = longest * (longest + 1) + 1
        self._engine = Engine(
            model, slots=slots, room=room, mask_id=mask_id, allowed=allowed, depth=depth, prefixes=prefixes
        )
        kind = self._engine.device.type  # autocast holds for a thread: the worker goes on in the caller's
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._slots = slots
        self._requests: dict[int, _Request] = {}  # in the engine, by the key of their row
        self._waiting: deque[_Request] = deque()
        self._count = 0
        self._stopped: Exception | None = None
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="elara-server", daemon=True)
        self._worker.start()

    def submit(self, prompt: list[int], sampling: SamplingConfig, mode: str | None = None) -> Stream:
        """Ask for a continuation of `prompt`; comes back at once. mode: default `sampling.mode`.

        Raises ElaraError for what this model cannot serve, for mode diffusion, whose blocks keep their own step, and
        for keys that are the server's to choose; RuntimeError when the server has failed.
        """
        pace = self._controllers[0] if self._controllers else None
        mode = resolve_mode(self.model, mode or sampling.mode, self.mask_id, pace)
        check_request(self.model, [prompt], sampling, mode, self.allowed, self.mask_id, self.depth)
        if mode == "diffusion":
            raise ElaraError("mode=diffusion is not served beside other requests: use ar or tidar, or `generate`")
        if sampling.exit_threshold:
            raise ElaraError("exit_threshold is not served: where recursion ends would depend on the other requests")
        if mode == "tidar" and (sampling.draft_length or sampling.groups):
            raise ElaraError("draft_length and groups are the server's to choose, for all requests: leave them null")
        with self._changed:
            if self._stopped is not None:
                raise _copy(self._stopped)
            row = new_row(self._count, prompt, sampling, sampling.seed, drafts=mode == "tidar")
            self._count += 1
            request = _Request(row)
            self._waiting.append(request)
            self._changed.notify()
        return Stream(request)

    def close(self) -> None:
        """Stop: what is not written yet ends with an ElaraError in its caller's thread. Waits for the current step."""
        self._stop(ElaraError("the server was closed"))
        self._worker.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self, error: Exception) -> None:
        with self._changed:
            self._stopped = self._stopped or error
            self._changed.notify()

    def _work(self) -> None:
        try:
            with self._autocast, inference(self.model):
                while self._turn():
                    pass
        except BaseException as error:  # whatever it was: nobody may wait for ever
            failure = RuntimeError(f"the server stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._stop(failure)
        finally:
            with self._changed:
                assert self._stopped is not None
                for request in [*self._requests.values(), *self._waiting]:
                    request.outbox.put(_copy(self._stopped))
                self._requests.clear()
                self._waiting.clear()

    def _turn(self) -> bool:
        """Let rows leave and join, and move all of them on by a step; False when the server was stopped."""
        engine = self._engine
        with self._changed:
            while not (self._stopped or self._waiting or engine.rows):
                self._changed.wait()
            if self._stopped:
                return False
            for request in [one for one in self._waiting if one.cancelled]:
                self._waiting.remove(request)
                request.outbox.put(None)
            for request in self._requests.values():
                request.row.left = 0 if request.cancelled else request.row.left
            self._leave()
            fresh = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._slots - len(engine.rows)))]
            self._requests |= {request.row.key: request for request in fresh}
        if not engine.rows:
            for controller in self._controllers:
                controller.begin()
        if fresh:
            engine.admit([request.row for request in fresh])
        if engine.rows:
            place = sum(size < len(engine.rows) for size in self._sizes[:-1])
            move(engine, self._fixed, self._controllers[place] if self._controllers else None)
            for row in engine.rows:
                self._requests[row.key].outbox.put(NotFinite() if row.broken else row.new)
            self._leave()
        return True

    def _leave(self) -> None:
        for row in self._engine.retire():
            self._requests.pop(row.key).outbox.put(None)


def _copy(error: Exception) -> Exception:
    """The same error for another thread: a traceback belongs to one."""
    twin = type(error)(*error.args)
    twin.__cause__ = error.__cause__
    return twin
