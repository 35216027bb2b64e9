"""One checkpoint in, one Result out; and several, whose speed is measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from elara.checkpoint import Loaded
from elara.data.progress import Progress
from elara.errors import ElaraError
from elara.evaluation.agreement import compare_scores
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
    the model cannot serve and for characters that its tokenizer lacks.
    """
    result = measure(loaded, text, wanted, name=name, reload=reload, depth=depth)
    measure_speeds([loaded], [result], text, wanted, depth=depth)
    return result


def measure(
    loaded: Loaded,
    text: HeldOutText,
    wanted: EvalConfig,
    *,
    name: str,
    reload: Reload | None = None,
    depth: int | None = None,
) -> Result:
    """All but speed."""
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
    for precision in wanted.precisions if reload is not None else []:
        assert reload is not None
        other = reload(precision).model
        with bar(precision) as progress:
            _, lower = measure_loss(
                other, windows, batch_tokens=wanted.batch_tokens, depth=depth, advance=progress.advance
            )
        result.agreement.append(compare_scores(precision, windows, scored, lower))
    return result


def measure_speeds(
    models: Sequence[Loaded],
    results: Sequence[Result],
    text: HeldOutText,
    wanted: EvalConfig,
    *,
    depth: int | None = None,
) -> None:
    """Fill in `speed` of the results; the models take turns."""
    if not wanted.speed_rounds or not wanted.prompts:
        return
    prompts = [
        held_out_prompts(
            text, loaded.tokenizer, wanted.prompts, min(wanted.prompt_tokens, loaded.config.model.context_length)
        )
        for loaded in models
    ]
    with Progress("speed", "rounds", total=wanted.speed_rounds + 1) as progress:
        found = measure_speed(
            models, prompts, wanted.new_tokens,
            rounds=wanted.speed_rounds, batch=wanted.speed_batch, depth=depth, advance=progress.advance,
        )  # fmt: skip
    for result, speed in zip(results, found, strict=True):
        result.speed = speed


def compare(
    models: Mapping[str, Loaded],
    text: HeldOutText,
    wanted: EvalConfig,
    *,
    reload: Callable[[str, str], Loaded] | None = None,
    depth: int | None = None,
) -> list[Result]:
    """Evaluate several checkpoints on the same text, by name. reload(name, precision) as in `evaluate`.

    Raises ElaraError as `evaluate` does, and when there is no model.
    """
    if not models:
        raise ElaraError("there is no checkpoint to evaluate: give at least one")
    results = []
    for name, loaded in models.items():
        own = None if reload is None else (lambda precision, name=name: reload(name, precision))
        results.append(measure(loaded, text, wanted, name=name, reload=own, depth=depth))
    measure_speeds(list(models.values()), results, text, wanted, depth=depth)
    return results
