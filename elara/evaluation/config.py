"""What to measure: the Hydra schema of the section `eval` of conf/evaluate.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from elara.config import PRECISIONS
from elara.errors import ElaraError


@dataclass
class EvalConfig:
    """Choices of an evaluation; checked when made, ElaraError names the bad key."""

    max_bytes: int | None = 131072  # held-out text to score, in UTF-8 bytes; null = all of it
    passage: int = 4096  # characters of each passage; the first token of a passage follows the end token
    stride: int | None = None  # tokens that each window scores; null = the context: windows side by side
    batch_tokens: int = 8192  # tokens per forward
    prompts: int = 16  # held-out prompts that drafts and speed are measured on; 0 = neither
    prompt_tokens: int = 32  # tokens of each prompt
    new_tokens: int = 64  # tokens written behind each prompt
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.8])  # of acceptance; 0 = greedy
    precisions: list[str] = field(default_factory=lambda: ["bfloat16"])  # compared with float32; [] = none
    speed_rounds: int = 5  # counted rounds of each decoding mode; 0 = no speed
    speed_batch: int = 1  # prompts written at once in a round
    tasks: list[str] = field(default_factory=list)  # tasks of lm-eval; [] = none
    task_folder: str | None = None  # folder of your own task files
    task_limit: int | None = None  # items of each task; null = all
    fewshot: int | None = None  # worked examples before each question; null = the task's own number
    tool_calls: int = 0  # held-out questions that a chat model answers by calling tools; 0 = none
    chat: bool = False  # put every question into the chat template
    seed: int = 0  # of sampled drafts and of few-shot examples

    def __post_init__(self) -> None:
        least = {"passage": 16, "batch_tokens": 1, "prompts": 0, "prompt_tokens": 1, "new_tokens": 1,
                 "speed_rounds": 0, "speed_batch": 1, "max_bytes": 1, "stride": 1, "task_limit": 1,
                 "fewshot": 0, "tool_calls": 0}  # fmt: skip
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise ElaraError(f"eval.{key}={value} must be at least {low}")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                known = ", ".join(PRECISIONS)
                raise ElaraError(f"eval.precisions={self.precisions}: {precision} must be one of: {known}")
        for value in self.temperatures:
            if not (value >= 0 and math.isfinite(value)):
                raise ElaraError(f"eval.temperatures={self.temperatures}: {value} must be 0 (greedy) or positive")
