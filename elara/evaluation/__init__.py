"""How good a model is: loss per byte, drafts, precisions, speed, tasks. A library; `elara.evaluate` is thin."""

from elara.evaluation.config import EvalConfig
from elara.evaluation.result import Result
from elara.evaluation.run import compare, evaluate
from elara.evaluation.text import HeldOutText, held_out_text

__all__ = ["EvalConfig", "HeldOutText", "Result", "compare", "evaluate", "held_out_text"]
