"""The schema of `conf/train.yaml`: a mistyped key or a value of the wrong type is an error that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from elara.backends.config import TeacherConfig
from elara.config import ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.data.config import DataConfig
from elara.tokenizer.config import TokenizerConfig


@dataclass
class RayConfig:
    """Where the jobs of a sweep go with `launcher=ray`."""

    address: str | None = None  # auto = the cluster that `ray start` made; null = one on this machine
    num_cpus: float = 1.0  # cores that a job reserves
    num_gpus: float = 0.0  # GPUs that a job reserves, and sees


@dataclass
class SweepConfig:
    """What concerns a sweep as a whole (`-m`)."""

    ray: RayConfig | None = None  # set by launcher=ray
    resume: str | None = None  # auto or a sweep folder: run the jobs of that sweep that are missing or failed


@dataclass
class DistillConfig:
    """How a student learns from the log-probabilities of its teachers."""

    weight: float = 0.5  # of the teachers' loss against the text's own, 0..1
    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jensen_shannon
    temperature: float = 1.0  # of both distributions
    top_k: int = 32  # tokens that are known one by one
    diffusion: bool = True  # the diffusion head learns from them too
    choice: str = "weights"  # weights | lowest_perplexity: how several teachers share a text
    opinions: str = "stored"  # stored | live: asked once before the run, or at every step
    context: int = 512  # stored: tokens that a teacher reads at once
    on_policy: float = 0.0  # share of the steps in which teachers judge what the student itself writes


@dataclass
class TrainConfig:
    """Everything `python -m elara.train` can be told. Groups without a class of ours are plain Hydra targets."""

    name: str = "elara"  # folder of the runs under outputs/train
    seed: int = 1  # of weights, data order, mask sections and recursion depths
    resume: str | None = None  # auto or a run folder: go on with that run in place
    init_from: str | None = None  # checkpoint, run folder or run name: start a new run from these weights
    compile: bool = False  # torch.compile of the blocks
    sweep: SweepConfig = field(default_factory=SweepConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    trm: TRMConfig = field(default_factory=TRMConfig)
    tidar: TiDARConfig = field(default_factory=TiDARConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    profiler: dict[str, Any] = field(default_factory=dict)


def register() -> None:
    """Make the schema known to Hydra as `train_schema`."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
