"""Prepare a corpus and say what is there: `python -m elara.data data=text data.path=my.txt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from elara import runs
from elara.cli import hydra_main
from elara.data import DataConfig, Prepared, prepare
from elara.data.sources import SPLITS
from elara.tokenizer import TokenizerConfig


@dataclass
class PrepareConfig:
    """Schema of conf/prepare.yaml."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def report(prepared: Prepared) -> None:
    """Print documents, tokens, characters and bytes of each split."""
    tokenizer, manifest = prepared.tokenizer, prepared.manifest
    kind = f"{tokenizer.kind} tokenizer of {tokenizer.vocab_size} ids"
    table = Table("split", "documents", "tokens", "characters", "size", title=f"{manifest['source']}, {kind}")
    for column in table.columns[1:]:
        column.justify = "right"
    for split in SPLITS:
        counts = manifest[split]
        size = sum((prepared.folder / f"{split}.{kind}").stat().st_size for kind in ("bin", "ends"))
        numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "characters")]
        table.add_row(split, *numbers, f"{size / 1e6:.2f} MB")
    console = Console()
    console.print(table)
    console.print(f"in {prepared.folder}", soft_wrap=True, highlight=False)


def run(config: DictConfig) -> None:
    """Task of the entry point."""
    wanted = cast(PrepareConfig, OmegaConf.to_object(config))
    report(prepare(wanted.data, wanted.tokenizer, runs.project_root() / "data"))


def main() -> None:
    """Console script `elara-data`."""
    ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)
    hydra_main("prepare", run)


if __name__ == "__main__":
    main()
