"""One checkpoint in, one Result out; and several, whose speed is measured in turn."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from elara.checkpoint import Loaded
from elara.data.progress import Progress
from elara.errors import ElaraError, naming
from elara.evaluation.agreement import compare_scores
from elara.evaluation.calls import check_chat, measure_calls
from elara.evaluation.config import EvalConfig
from elara.evaluation.drafts import held_out_prompts, measure_drafts
from elara.evaluation.loss import cut_windows, measure_loss
from elara.evaluation.result import Result
from elara.evaluation.speed import measure_speed
from elara.evaluation.text import HeldOutText

Reload = Callable[[str], Loaded]  # the same checkpoint in another precision


def evaluate(
    loaded: Loaded,
    text: HeldOutText,
    wanted: EvalConfig,
    *,
    name: str = "model",
    reload: Reload | None = None,
    depth: int | None = None,
) -> Result:
    """Everything that `wanted` asks for, of one checkpoint.

    name: for messages and the result. reload: gives the checkpoint in a precision of `wanted.precisions`; without it
    precisions are not compared. depth: recursion depth, default the trained one. Raises ElaraError for settings that
    the model cannot serve and for characters that its tokenizer lacks, NotFinite where it gives no numbers.
    """

    def again(_: str, precision: str) -> Loaded:
        assert reload is not None
        return reload(precision)

    return compare({name: loaded}, text, wanted, reload=again if reload else None, depth=depth)[0]


def _measure(
    loaded: Loaded,
    text: HeldOutText,
    wanted: EvalConfig,
    *,
    name: str,
    depth: int | None,
    lower: Mapping[str, Loaded],
) -> Result:
    """All but speed. lower: the same model by precision."""
    model, tokenizer, context = loaded.model, loaded.tokenizer, loaded.config.model.context_length
    parameters = sum(weight.numel() for weight in model.parameters())
    result = Result(name, loaded.meta.get("step"), parameters)
    windows = cut_windows(text, tokenizer, context, wanted.stride, name)

    def bar(label: str) -> Progress:
        return Progress(f"{name}: {label}", "windows", total=len(windows.requests))

    with bar("loss") as progress:
        result.loss, scored = measure_loss(
            model, windows, batch_tokens=wanted.batch_tokens, depth=depth, advance=progress.advance
        )
    if wanted.prompts and loaded.config.tidar.block_length > 1:
        prompts = held_out_prompts(text, tokenizer, wanted.prompts, min(wanted.prompt_tokens, context))
        with Progress(f"{name}: drafts", "parts", total=1 + len(wanted.temperatures)) as progress:
            result.drafts = measure_drafts(
                model, tokenizer, windows, prompts, wanted.temperatures, wanted.new_tokens,
                seed=wanted.seed, depth=depth, advance=progress.advance,
            )  # fmt: skip
    for precision, other in lower.items():
        with bar(precision) as progress, naming(precision):
            _, rescored = measure_loss(
                other.model, windows, batch_tokens=wanted.batch_tokens, depth=depth, advance=progress.advance
            )
        result.agreement.append(compare_scores(precision, windows, scored, rescored))
    if wanted.tool_calls:
        with Progress(f"{name}: tool calls", "questions", total=wanted.tool_calls) as progress:
            result.tool_calls = measure_calls(loaded, wanted.tool_calls, depth=depth, advance=progress.advance)
    if wanted.tasks:
        result.tasks = harness().run_tasks(loaded, wanted, name=name, depth=depth)
    return result


def _measure_speeds(
    models: Sequence[dict[str, Loaded]],
    results: Sequence[Result],
    text: HeldOutText,
    wanted: EvalConfig,
    depth: int | None,
) -> None:
    """Fill in `speed` of the results; all models, each by precision, take turns."""
    if not wanted.speed_rounds or not wanted.prompts:
        return
    prompts = []
    for own in models:
        loaded = own["float32"]
        length = min(wanted.prompt_tokens, loaded.config.model.context_length)
        prompts.append(held_out_prompts(text, loaded.tokenizer, wanted.prompts, length))
    with Progress("speed", "rounds", total=wanted.speed_rounds + 1) as progress:
        found = measure_speed(
            models, prompts, wanted.new_tokens,
            rounds=wanted.speed_rounds, batch=wanted.speed_batch, depth=depth, advance=progress.advance,
        )  # fmt: skip
    for result, speed in zip(results, found, strict=True):
        result.speed = speed


def harness() -> ModuleType:
    """`elara.evaluation.harness`, when it is needed: lm-eval is an extra, and takes seconds to import."""
    try:
        return importlib.import_module("elara.evaluation.harness")
    except ImportError as error:
        advice = "pip install 'elara-hivemind[eval]'"
        raise ElaraError(f"eval.tasks need lm-eval ({error.name} is missing): {advice}") from error


def compare(
    models: Mapping[str, Loaded],
    text: HeldOutText,
    wanted: EvalConfig,
    *,
    reload: Callable[[str, str], Loaded] | None = None,
    depth: int | None = None,
) -> list[Result]:
    """Evaluate several checkpoints, all in memory at once, on the same text. reload(name, precision) as in `evaluate`.

    Raises ElaraError as `evaluate` does, and when there is no model.
    """
    if not models:
        raise ElaraError("there is no checkpoint to evaluate: give at least one")
    if wanted.tasks:
        harness().find_tasks(wanted.tasks, wanted.task_folder)  # a typo should not wait for the rest
    if wanted.tool_calls:
        for name, loaded in models.items():
            check_chat(name, loaded)
    results, every = [], []
    for name, loaded in models.items():
        precisions = [precision for precision in dict.fromkeys(wanted.precisions) if precision != "float32"]
        lower = {precision: reload(name, precision) for precision in precisions} if reload is not None else {}
        with naming(loaded.path or name):
            results.append(_measure(loaded, text, wanted, name=name, depth=depth, lower=lower))
        every.append({"float32": loaded, **lower})
    _measure_speeds(every, results, text, wanted, depth)
    return results
