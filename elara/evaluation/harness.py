"""Elara as a model of lm-eval, and a run of its tasks. Importing this needs the extra `eval`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from elara.checkpoint import Loaded
from elara.data.progress import Progress
from elara.decoding import SamplingConfig, generate, writable
from elara.errors import ElaraError
from elara.evaluation.config import EvalConfig
from elara.evaluation.scoring import Request, rolling_windows, score

FOLDER = Path(__file__).parent / "tasks"  # of the tasks that come with Elara
NEW_TOKENS = 256  # that an answer may have when its task does not say
ROWS = 64  # answers written at once, at most
_RESERVED = re.compile("\x02(\\d+)\x03")  # a reserved id in a text of the chat template


class ElaraEval(TemplateLM):
    """A checkpoint behind lm-eval's three questions: loglikelihood, loglikelihood_rolling, generate_until.

    batch_tokens: padded tokens per forward. depth: recursion depth, default the trained one. name: for messages.
    """

    def __init__(
        self, loaded: Loaded, *, name: str = "model", batch_tokens: int = 8192, depth: int | None = None
    ) -> None:
        super().__init__()
        self.loaded, self.name, self.batch_tokens, self.depth = loaded, name, batch_tokens, depth
        self.max_length: int = loaded.config.model.context_length
        self._device = loaded.model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.end_id

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; what `apply_chat_template` wrote for reserved ids becomes those ids again."""
        ids = list[int]()
        for i, part in enumerate(_RESERVED.split(string)):
            try:
                ids += [int(part)] if i % 2 else self.loaded.tokenizer.encode_exactly(part).tolist()
            except ElaraError as error:
                raise ElaraError(f"{self.name} cannot read a task's text: {error}") from error
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the tokenizer's template, as text that `tok_encode` takes back to the same ids.

        Without `add_generation_prompt` the last message stays open, to be continued.
        """
        tokenizer = self.loaded.tokenizer
        chat, _ = tokenizer.apply_chat(chat_history, generate=add_generation_prompt, exact=True)
        if not add_generation_prompt and chat and chat[-1] == tokenizer.end_id:
            chat.pop()
        text = ""
        plain: list[int] = []
        for token in chat:
            if token in tokenizer.special_ids:
                text += f"{tokenizer.decode(plain)}\x02{token}\x03"
                plain.clear()
            else:
                plain.append(token)
        return text + tokenizer.decode(plain)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation and whether greedy decoding would write it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        cut = [list(self._windows(context, continuation)) for _, context, continuation in requests]
        found = self._sums(cut, "loglikelihood")
        for (pair, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text behind the end token, in windows of the context's length."""
        texts = [request.args[0] for request in requests]
        cut = [
            list(rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, self.max_length))
            for text in texts
        ]
        found = [total for total, _ in self._sums(cut, "rolling loglikelihood")]
        for text, total in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What follows each context, up to the first of its `until` strings or the end token.

        A context that leaves no room for the answer loses its beginning, but keeps half a context at least; an answer
        that is longer than what is left goes on in a sliding window.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        found = [""] * len(requests)
        with Progress(f"{self.name}: answers", "requests", total=len(requests)) as progress:
            for own in groups.values():
                options = normalize_gen_kwargs(requests[own[0]].args[1], NEW_TOKENS)
                room = max(self.max_length - options["max_gen_toks"], self.max_length // 2, 1)
                ids = {i: (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in own}
                for batch in self._rows(ids, options["max_gen_toks"]):
                    answers = self._answers([ids[i] for i in batch], options)
                    for i, answer in zip(batch, answers, strict=True):
                        found[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    progress.advance(len(batch))
        return found

    def _windows(self, context: list[int], continuation: list[int]) -> Iterator[Request]:
        """One request; several where the continuation is longer than the model's context."""
        tokens = [*context, *continuation]
        for start in range(0, max(1, len(continuation)), self.max_length):
            targets = continuation[start : start + self.max_length]
            read = tokens[: len(context) + start + max(len(targets), 1) - 1]
            yield Request(tuple(read[-self.max_length :]), tuple(targets))

    def _sums(self, cut: list[list[Request]], label: str) -> list[tuple[float, bool]]:
        """Summed log-probability over the windows of each text, and whether all their tokens are the likeliest."""
        flat = [request for windows in cut for request in windows]
        allowed = writable(self.loaded.tokenizer, self.loaded.config.vocab_size)  # what greedy decoding may write
        with Progress(f"{self.name}: {label}", "windows", total=len(flat)) as progress:
            every = score(
                self.loaded.model, flat,
                batch_tokens=self.batch_tokens, depth=self.depth, allowed=allowed, advance=progress.advance,
            )  # fmt: skip
        scored = iter(every)
        found = []
        for windows in cut:
            total, greedy = 0.0, True
            for request, one in zip(windows, scored, strict=False):
                total += float(one.log_probs.double().sum())
                greedy = greedy and one.best.tolist() == list(request.targets)
            found.append((total, greedy))
        return found

    def _rows(self, ids: Mapping[int, list[int]], new: int) -> Iterator[list[int]]:
        """Keys of `ids` in batches of similar length, longest first."""
        order = sorted(ids, key=lambda i: -len(ids[i]))
        while order:
            size = max(1, min(ROWS, self.batch_tokens // (len(ids[order[0]]) + new)))
            yield order[:size]
            order = order[size:]

    def _answers(self, prompts: list[list[int]], options: Mapping[str, Any]) -> list[str]:
        """Continue all prompts until each has met its end."""
        tokenizer, until = self.loaded.tokenizer, [stop for stop in options["until"] if stop]
        sampled = bool(options.get("do_sample")) and options.get("temperature", 1.0) > 0
        sampling = SamplingConfig(
            max_new_tokens=options["max_gen_toks"],
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
            stop=[tokenizer.end_id],
        )
        allowed = writable(tokenizer, self.loaded.config.vocab_size)
        decoders = [tokenizer.stream_decoder() for _ in prompts]
        texts, open_ = [""] * len(prompts), set(range(len(prompts)))
        steps = generate(self.loaded.model, prompts, sampling, mode="ar", allowed=allowed, depth=self.depth)
        for step in steps:
            for row in sorted(open_):
                before = len(texts[row])
                texts[row] += "".join(decoders[row].feed(t) for t in step.tokens[row] if t != tokenizer.end_id)
                if step.finished[row]:
                    texts[row] += decoders[row].flush()
                if step.finished[row] or any(
                    texts[row].find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in until
                ):
                    open_.remove(row)
            if not open_:
                break
        return [_cut(text, until) for text in texts]


def run_tasks(
    loaded: Loaded, wanted: EvalConfig, *, name: str = "model", depth: int | None = None
) -> dict[str, dict[str, float]]:
    """Run the tasks of `wanted` through lm-eval; task -> metric -> value, with `<metric>_stderr` where there is one.

    The tasks that come with Elara need no network. Raises ElaraError for an unknown task and for one whose data cannot
    be had.
    """
    model = ElaraEval(loaded, name=name, batch_tokens=wanted.batch_tokens, depth=depth)
    with _quiet():
        manager = find_tasks(wanted.tasks, wanted.task_folder)
        found = simple_evaluate(
            model=model,
            tasks=_loaded(manager, wanted.tasks),
            num_fewshot=wanted.fewshot,
            limit=wanted.task_limit,
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=wanted.chat,
            task_manager=manager,
            random_seed=wanted.seed,
            numpy_random_seed=wanted.seed,
            torch_random_seed=wanted.seed,
            fewshot_random_seed=wanted.seed,
        )
    return {task: dict(_figures(found["results"][task])) for task in sorted(found["results"])}


def find_tasks(tasks: Sequence[str], folder: str | None = None) -> TaskManager:
    """The index of tasks: lm-eval's own, which takes seconds to read, only where one of them is asked for.

    folder: further task files. Raises ElaraError for a name that none of them has.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ElaraError(f"eval.task_folder={folder} is not a folder")
    places = [str(FOLDER), *([folder] if folder is not None else [])]
    manager = TaskManager(include_path=places, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=places)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        own = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ElaraError(f"eval.tasks: there is no '{unknown[0]}'; with Elara come {own}; `lm-eval ls tasks` lists all")
    return manager


def _loaded(manager: TaskManager, tasks: Sequence[str]) -> list[Any]:
    """The tasks themselves; ElaraError when the data of one cannot be had."""
    found: list[Any] = []
    for task in tasks:
        try:
            built = manager.load([task])
        except Exception as error:  # a dataset of the hub may fail in as many ways as networks do
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ElaraError(f"eval.tasks: {task} cannot be loaded ({reason})") from error
        found += built["groups"].values() or built["tasks"].values()
    return found


def _figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of one task under `metric` and `metric_stderr`; the filter's name stays where it says something."""
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float):
            base, stderr = metric.removesuffix("_stderr"), metric.endswith("_stderr")
            label = base if filtered == "none" else f"{base} ({filtered})"
            yield label + ("_stderr" if stderr else ""), float(value)


def _cut(text: str, until: Iterable[str]) -> str:
    """The text before the first of the strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval reports its steps on both streams and shows bars; only errors are ours to hear."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels, bars = [logger.level for logger in loggers], lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(bars, disable=True)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap in this process
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        lm_eval.api.task.tqdm = bars
