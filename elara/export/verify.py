"""An exported file read back, through llama.cpp and through our own runtime, and compared with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from elara.export.layout import UNROLLED
from elara.export.llama_cpp import Library
from elara.export.llama_model import LlamaModel
from elara.export.reference import Reference, divergence, loss

Logits = Callable[[Sequence[int]], NDArray[np.float32]]

MAX_DIFFERENCE = 1e-3  # of float32 logits
# What a type may change, nats per token: the loss by at most, the divergence at most. At least five times what trained
# character models show (elara_nano, 500 steps: Q8_0 0.0001 and 0.0001, Q6_K 0.002 and 0.0005, Q4_K_M 0.004 and 0.002,
# Q4_0 0.003 and 0.003), and, since models lose more the better they are, about twice the losses of Llama 3 8B in
# llama.cpp's pull request 6936 (Q8_0 0.0004, Q6_K 0.0035, Q4_K_M 0.028). One matrix of zeros in an F16 file of that
# elara_nano has a divergence of 0.0005 to 0.06.
LIMITS = {
    "F32": (1e-4, 1e-6),
    "F16": (1e-3, 1e-4),
    "BF16": (5e-3, 1e-3),
    "Q8_0": (5e-3, 5e-3),
    "Q6_K": (0.012, 0.012),
    "Q5_K_M": (0.02, 0.02),
    "Q5_K_S": (0.02, 0.02),
    "Q4_K_M": (0.05, 0.06),
    "Q4_K_S": (0.06, 0.08),
    "Q4_0": (0.12, 0.15),
}


@dataclass(frozen=True)
class Agreement:
    """How a reader's logits differ from the checkpoint's.

    difference: the largest of any logit. argmax: share of tokens whose likeliest successor is the same. loss and
    loss_difference: nats per token. divergence: of its distributions from the checkpoint's, nats per token. greedy, of:
    equal tokens before the first other one, and how many were written.
    """

    reader: str
    difference: float
    argmax: float
    loss: float
    loss_difference: float
    divergence: float
    greedy: int
    of: int

    def problem(self, kind: str) -> str | None:
        """What is wrong with it for a file of this type, or None."""
        loss_limit, limit = LIMITS[kind]
        if not abs(self.loss_difference) <= loss_limit:  # nan is a problem, too
            return f"{self.reader}: the loss differs by {self.loss_difference:+.5f}, {kind} may by {loss_limit}"
        if not self.divergence <= limit:
            return f"{self.reader}: the divergence is {self.divergence:.2g}, that of {kind} may be {limit:g}"
        if kind == "F32" and not self.difference <= MAX_DIFFERENCE:
            return f"{self.reader}: logits differ by {self.difference:.2g}, F32 may by {MAX_DIFFERENCE}"
        return None


def verify(
    path: Path, architecture: str, reference: Reference, library: Library | None
) -> tuple[list[Agreement], list[str]]:
    """Read a GGUF file back with every reader there is for it; also returns who else does not read it, and why."""
    found, unread = [], []
    longest = max(len(reference.prompt) + len(reference.greedy), *map(len, reference.windows))
    if architecture == UNROLLED and library is not None:
        with LlamaModel(library, path, longest) as model:
            written = model.greedy(reference.prompt, len(reference.greedy))
            found.append(compare("llama.cpp", reference, model.logits, written))
    from elara.elara import Elara, GGUFError  # needs nothing of ours, and nothing else here needs it

    try:
        runtime = Elara.load(path, use_torch=False)
    except GGUFError as error:  # types that llama.cpp falls back to for odd sizes
        unread.append(f"elara.py does not read it: {error}")
        return found, unread
    found.append(compare("elara.py", reference, runtime.logits, _greedy(runtime.logits, reference)))
    return found, unread


def compare(reader: str, reference: Reference, logits: Logits, written: Sequence[int]) -> Agreement:
    """A reader's logits and greedy text against the checkpoint's."""
    theirs = [logits(ids) for ids in reference.windows]
    pairs = list(zip(theirs, reference.logits, strict=True))
    same = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs)
    own = loss(theirs, reference.windows)
    equal = [a == b for a, b in zip(written, reference.greedy, strict=False)]
    return Agreement(
        reader=reader,
        difference=max(float(np.abs(a - b).max()) for a, b in pairs),
        argmax=same / sum(len(ids) for ids in reference.windows),
        loss=own,
        loss_difference=own - loss(reference.logits, reference.windows),
        divergence=divergence(theirs, reference.logits),
        greedy=equal.index(False) if False in equal else len(equal),
        of=len(reference.greedy),
    )


def table(found: Sequence[Agreement], reference: Reference, kind: str) -> Table:
    """The comparison as a table."""
    tokens = sum(map(len, reference.windows))
    title = f"{kind} against the checkpoint in float32, on {tokens} tokens of {reference.text}"
    shown = Table(title=title, title_justify="left", title_style="")
    for column in (
        "read by",
        "max logit difference",
        "same argmax",
        "loss",
        "difference",
        "divergence",
        "greedy tokens",
        "",
    ):
        shown.add_column(column, justify="left" if column in ("read by", "") else "right")
    for one in found:
        shown.add_row(
            one.reader,
            f"{one.difference:.2g}",
            f"{one.argmax:.1%}",
            f"{one.loss:.4f}",
            f"{one.loss_difference:+.5f}",
            f"{one.divergence:.2g}",
            f"{one.greedy} of {one.of}",
            "ok" if one.problem(kind) is None else "differs",
        )
    return shown


def _greedy(logits: Logits, reference: Reference) -> list[int]:
    """The likeliest token behind each beginning of the checkpoint's greedy text: up to the first that differs, this is
    what the reader would write, and takes one forward."""
    ids = [*reference.prompt, *reference.greedy[:-1]]
    return [int(token) for token in logits(ids)[len(reference.prompt) - 1 :].argmax(1)]
