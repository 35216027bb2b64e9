"""Let the model write at validations, into samples.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from elara.data.batches import Batch
from elara.data.conversation import Conversation
from elara.decoding import SamplingConfig, complete
from elara.errors import never_fatal
from elara.runs import Run
from elara.training.loggers import Monitor
from elara.training.sharding import gathered

HEADER = "==== step {step} ===="
HELD_OUT = 48  # tokens of the held-out text that stand in for a missing prompt


class Samples(Callback):
    """Writes one sample per prompt, the prompt in brackets, after every `every`-th validation and the last step.

    Args:
        folder: the run folder.
        prompts: texts to continue, "" begins a document; None: the first words of the held-out text. Of data of
            conversations: messages to answer.
        every: validations from one sample to the next.
        sampling: keys of `elara.decoding.SamplingConfig`.
    """

    def __init__(self, folder: str, prompts: list[str] | None = None, every: int = 1, **sampling: Any) -> None:
        self.path = Run(Path(folder)).samples
        self.prompts = None if prompts is None else list(prompts)
        self.every = every
        self.sampling = SamplingConfig(**sampling)
        self._validations = 0
        self._first: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._validations = state["validations"]

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            length = min(HELD_OUT, module.model.config.model.context_length // 2)
            self._first = [token for token in batch.tokens[0, :length].tolist() if token >= 0]

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self._validations += 1
        last = module.step >= trainer.max_steps
        if self._validations % self.every and not last:
            return
        with gathered(module.model):
            if trainer.is_global_zero:
                with never_fatal("writing samples"):
                    self._write(trainer, module)

    def _write(self, trainer: Trainer, module: Any) -> None:
        chat = trainer.datamodule.chat  # type: ignore[attr-defined]
        first = "Hello!" if chat else module.tokenizer.decode(self._first)
        prompts = [first] if self.prompts is None else self.prompts
        codec = Conversation(module.tokenizer) if chat else module.tokenizer
        samples = [(text, complete(module.model, codec, text, self.sampling).text) for text in prompts]
        write_samples(self.path, module.step, [f"[{prompt}]{text}" if prompt else text for prompt, text in samples])
        for logger in trainer.loggers:
            if isinstance(logger, Monitor):
                logger.log_samples(samples, module.step)


def write_samples(path: Path, step: int, texts: list[str]) -> None:
    """Append the texts of one step; blocks of this step or later ones, left from before a resume, are dropped."""
    before = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for match in re.finditer(r"^==== step (\d+) ====$", before, re.MULTILINE):
        if int(match[1]) >= step:
            before = before[: match.start()]
            break
    block = "\n".join([HEADER.format(step=step), "\n----\n".join(texts), "", ""])
    path.write_text(before + block, "utf-8")


def last_sample(path: Path) -> str:
    """The first text of the newest block in samples.txt, or "" when there is none."""
    if not path.exists():
        return ""
    block = re.split(r"^==== step \d+ ====\n", path.read_text("utf-8", errors="replace"), flags=re.MULTILINE)[-1]
    return block.split("\n----\n")[0].rstrip()
