"""Measure how good checkpoints are: `python -m elara.evaluate checkpoint=[a,b]` gives a table, JSON and a picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from elara import runs
from elara.cli import hydra_main
from elara.data.config import DataConfig
from elara.errors import ElaraError
from elara.evaluation.config import EvalConfig
from elara.evaluation.models import data_of, find_models


@dataclass
class EvaluateConfig:
    """Schema of conf/evaluate.yaml."""

    checkpoint: Any = None  # one or a list of checkpoint folders, run folders or run names
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: dict[str, Any] = field(default_factory=dict)  # data sets bring one; the checkpoint's own is used
    depth: int | None = None
    device: str = "auto"
    eval: EvalConfig = field(default_factory=EvalConfig)


def evaluate(config: DictConfig) -> None:
    """Evaluate the checkpoints and write what came out."""
    hydra = HydraConfig.get()
    chosen = hydra.runtime.choices.get("data") is not None
    for given in hydra.overrides.task:
        if given.startswith("tokenizer"):
            raise ElaraError(f"{given}: text is always read by the checkpoint's own tokenizer; leave this out")
    wanted = cast(EvaluateConfig, OmegaConf.to_object(config))
    folders = find_models(wanted.checkpoint)
    runs.say_reading(*folders.values())
    data = wanted.data if chosen else data_of(next(iter(folders.values()))) or wanted.data
    # torch takes seconds to import: a typo should not wait for it
    from elara import checkpoint
    from elara.device import find_device
    from elara.evaluation.report import table, write
    from elara.evaluation.run import compare
    from elara.evaluation.text import held_out_text

    device, measures = find_device(wanted.device), wanted.eval
    text = held_out_text(data, runs.project_root() / "data", max_bytes=measures.max_bytes, passage=measures.passage)
    models = {name: checkpoint.load(folder, device=device) for name, folder in folders.items()}
    results = compare(
        models,
        text,
        measures,
        reload=lambda name, precision: checkpoint.load(folders[name], device=device, precision=precision),
        depth=wanted.depth,
    )
    console = Console(width=None if sys.stdout.isatty() else 60 + 30 * len(results))
    console.print(table(results, text))
    about = {"checkpoints": {name: str(path) for name, path in folders.items()}, "device": str(device)}
    files = write(results, text, {**about, "eval": OmegaConf.to_container(config.eval)}, Path(hydra.runtime.output_dir))
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def main() -> None:
    """Console script `elara-evaluate`."""
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    hydra_main("evaluate", evaluate)


if __name__ == "__main__":
    main()
