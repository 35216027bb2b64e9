"""Whole training steps of three models on a CPU, without Lightning: what `costs.py` and `shares.py` measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.profiler import record_function

from elara.cli import register_resolvers
from elara.config import ElaraConfig
from elara.model import ElaraLM
from elara.training import optimizers, profiling
from elara.training.config import register
from elara.training.losses import elara_loss

CONF = Path(__file__).parents[2] / "conf"
# the model, windows of a step, optimizer; the second has the proportions of the 2.8 B model at half its width
MODELS = {
    "elara_nano": (["model=elara_nano", "model.vocab_size=128"], 8, "muon"),
    "2.8 B proportions": (
        ["model=elara_2p8b", "model.n_layer=2", "model.n_embd=640", "model.hidden=2048", "model.vocab_size=2048",
         "model.context_length=256"], 4, "adamw",
    ),
    "elara_tiny": (["model=elara_tiny", "model.vocab_size=128"], 8, "muon"),
}  # fmt: skip
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8}
OPTIMIZERS = {
    "adamw": partial(optimizers.adamw, lr=1e-3, weight_decay=0.1, **ADAM),  # type: ignore[arg-type]
    "muon": partial(
        optimizers.muon, lr=0.02, momentum=0.95, weight_decay=0.01, adam_lr=4e-3, **ADAM,  # type: ignore[arg-type]
    ),
}  # fmt: skip


def part(name: str) -> record_function:
    """A range for the profile; the model's own parts lie inside."""
    return record_function(f"{name}{profiling.SIGN}step")


def training_step(name: str, narrow: bool) -> tuple[ElaraLM, Callable[[], None]]:
    """A model with experts, recursion and a section at a quarter of the blocks, and one step of it."""
    overrides, batch, optimizer_name = MODELS[name]
    register_resolvers()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", overrides=overrides)
    groups = {group: OmegaConf.to_container(composed[group]) for group in ("model", "moe", "trm", "tidar")}
    config = ElaraConfig.from_dict(groups)
    config = replace(config, tidar=replace(config.tidar, block_length=4, block_fraction=0.25))
    torch.manual_seed(0)
    model, generator = ElaraLM(config), torch.Generator().manual_seed(1)
    optimizer = OPTIMIZERS[optimizer_name](model)
    shape = (batch, config.model.context_length + 1)

    def step() -> None:
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
        with part(profiling.LOSS), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = elara_loss(model, tokens, generator, mask_id=0).total
        optimizer.zero_grad()
        with part(profiling.AUTOGRAD):
            loss.backward()
        with part(profiling.OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return model, step
